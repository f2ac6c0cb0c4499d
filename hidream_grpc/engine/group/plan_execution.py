"""Runs one plan on all ranks, and finds which rank caused it to fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from hidream_grpc.background import keep_doing
from hidream_grpc.engine.group.hang_detection import HangDetector
from hidream_grpc.engine.group.proc_stat import SAMPLE_INTERVAL_SECONDS
from hidream_grpc.engine.group.rank_link import RankLink
from hidream_grpc.engine.protocol.messages import PlanDone, StepPlan
from hidream_grpc.errors import LossCause, RankDiedError

DEATH_NOTICE_SECONDS = 1.0
"""How long to wait for the report of a death: a survivor may report the broken group first."""

CAUSE_PRECEDENCE = (LossCause.OUT_OF_MEMORY, LossCause.FAULT, LossCause.OUTSIDE)
"""Which cause counts when several ranks left the group: the first of these."""


async def run_plan(
    ranks: Sequence[RankLink], plan: StepPlan, detector: HangDetector, loss: asyncio.Event
) -> tuple[PlanDone, ...]:
    """Run a plan on all ranks, and kill those that hang.

    Args:
        ranks: all ranks of the group.
        plan: the plan to run.
        detector: a new detector, for this plan alone.
        loss: an event that is set when a process of the group is gone.

    Returns:
        The answers of the ranks, in the order of `ranks`.

    Raises:
        RankDiedError: a rank is gone, or left the group; of several the first by `CAUSE_PRECEDENCE`.
    """
    running = {rank: asyncio.create_task(rank.run(plan)) for rank in ranks}
    watching = asyncio.create_task(watch_ranks(running, detector))
    try:
        await asyncio.wait(running.values(), return_when=asyncio.FIRST_EXCEPTION)
        failures = _failures(running)
        if not failures:
            return tuple(task.result() for task in running.values())
        await _wait_for_cause(running, loss)
    finally:
        for task in (watching, *running.values()):
            task.cancel()
    raise min(_failures(running), key=lambda failure: CAUSE_PRECEDENCE.index(failure.cause))


async def wait_for_death_report(loss: asyncio.Event) -> None:
    """Wait a moment for the report of a death, which may be under way."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DEATH_NOTICE_SECONDS):
            await loss.wait()


async def watch_ranks(running: Mapping[RankLink, asyncio.Future[Any]], detector: HangDetector) -> NoReturn:
    """Sample the ranks that have not answered, and kill those that hang, until this task is cancelled."""
    sampled_at = time.monotonic()

    async def sample_all() -> None:
        nonlocal sampled_at
        now = time.monotonic()
        # A server that was itself frozen or starved must not count that time against the ranks.
        elapsed_seconds, sampled_at = min(now - sampled_at, 2 * SAMPLE_INTERVAL_SECONDS), now
        unanswered = {rank.rank: rank for rank, task in running.items() if not task.done()}
        samples = {number: sample for number, rank in unanswered.items() if (sample := rank.sample())}
        hanging = detector.observe(samples, elapsed_seconds)
        await asyncio.gather(*(unanswered[rank].kill_hung(f"hung: {why}") for rank, why in hanging.items()))

    # Most plans end before the first sample.
    await asyncio.sleep(SAMPLE_INTERVAL_SECONDS)
    await keep_doing("look for ranks that hang", sample_all, lambda: asyncio.sleep(SAMPLE_INTERVAL_SECONDS))


async def _wait_for_cause(running: Mapping[RankLink, asyncio.Task[PlanDone]], loss: asyncio.Event) -> None:
    """Give the rank that broke the group time to say so: those that only noticed may answer first."""
    noticed = asyncio.create_task(wait_for_death_report(loss))
    answers = asyncio.create_task(asyncio.wait(running.values()))
    try:
        await asyncio.wait((noticed, answers), return_when=asyncio.FIRST_COMPLETED)
    finally:
        noticed.cancel()
        answers.cancel()


def _failures(running: Mapping[RankLink, asyncio.Task[PlanDone]]) -> list[RankDiedError]:
    """The losses of ranks among the tasks; any other error is raised."""
    failures = []
    for task in running.values():
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, RankDiedError):
            failures.append(error)
        elif error is not None:
            raise error
    return failures
