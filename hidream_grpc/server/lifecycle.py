"""What a server does at its start, at a signal, and at its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

from hidream_grpc.background import BackgroundTasks, reason_of
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.errors import (
    ArtifactUnavailableError,
    ConfigurationError,
    HiDreamError,
    StoreFullError,
    StoreInUseError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreVersionError,
)
from hidream_grpc.jobs.service import JobService
from hidream_grpc.server.configuration import DrainTimes
from hidream_grpc.server.health import HealthServicer
from hidream_grpc.server.signals import Signals, end_within

logger = logging.getLogger(__name__)

END_SECONDS = 4.0
"""Time after the grace period by which the process has ended, even if the stores do not answer."""


@contextlib.contextmanager
def naming_flag(flag: str) -> Iterator[None]:
    """Turn an error of a store at the start into one line that names the flag."""
    try:
        yield
    except (StoreInUseError, StoreUnusableError, StoreVersionError) as error:
        raise ConfigurationError(flag, str(error)) from None
    except (StoreUnavailableError, StoreFullError) as error:
        raise ConfigurationError(flag, reason_of(error)) from None
    except ArtifactUnavailableError as error:
        raise ConfigurationError(flag, error.reason) from None


def take_all_devices(group: RankGroup, step_limit: StepLimit) -> None:
    """Use the devices as the operator asked, though some failed or lacked memory before."""
    lowered_pixels = step_limit.pixels
    step_limit.forget()
    if step_limit.pixels > lowered_pixels:
        logger.info("SIGHUP: a step may hold %d pixels again", step_limit.pixels)
    if group.ask_for_full_layout():
        logger.info("SIGHUP: going back to layout %s", group.full_layout)
    else:
        logger.info("SIGHUP: the layout is the one that was asked for")


async def until_stopped(signals: Signals, *tasks: asyncio.Task[None]) -> None:
    """Return on the first signal; raise what ended one of the tasks if that comes first."""
    first_signal = asyncio.create_task(signals.first.wait())
    await asyncio.wait((*tasks, first_signal), return_when=asyncio.FIRST_COMPLETED)
    first_signal.cancel()
    _raise_what_ended(tasks)


async def drain(
    times: DrainTimes, signals: Signals, health: HealthServicer, jobs: JobService, *tasks: asyncio.Task[None]
) -> None:
    """Let running jobs end, unless a second signal comes; raise what ends one of the tasks meanwhile."""
    logger.info("draining for up to %g s", times.grace_seconds)
    end_within(times.delay_seconds + times.grace_seconds + END_SECONDS)
    health.mark_draining()
    second_signal = asyncio.create_task(signals.second.wait())
    await asyncio.wait(
        (second_signal, *tasks), timeout=times.delay_seconds, return_when=asyncio.FIRST_COMPLETED
    )
    drained = BackgroundTasks().start(jobs.drain(times.grace_seconds), "draining")
    await asyncio.wait((drained, second_signal, *tasks), return_when=asyncio.FIRST_COMPLETED)
    if second_signal.done():
        end_within(END_SECONDS)
    for task in (drained, second_signal):
        task.cancel()
    _raise_what_ended(tasks)


async def end(*tasks: asyncio.Task[None]) -> None:
    """Cancel the tasks and wait for them; what ends one meanwhile is logged, unless it is being raised."""
    raised = sys.exception()
    for task in tasks:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(error, Exception) and error is not raised:
            logger.error("the server did not end in order", exc_info=error)


def _raise_what_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, HiDreamError):
                logger.critical("the server ends, since a task of it has failed", exc_info=error)
            raise error
