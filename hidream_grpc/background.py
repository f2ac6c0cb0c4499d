"""Work that runs beside what serves callers: nothing of it fails unseen, and its loops go on.

Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NoReturn, TypeVar

from hidream_grpc.errors import ArtifactUnavailableError, HiDreamError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""Between two tries of anything that is retried."""

Result = TypeVar("Result")


class BackgroundTasks:
    """Tasks that nobody awaits, held until they end; the log has the error of each that fails."""

    def __init__(self) -> None:
        # The event loop itself holds tasks weakly.
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coroutine: Coroutine[Any, Any, Result], activity: str) -> asyncio.Task[Result]:
        """Run a coroutine as a task.

        Args:
            coroutine: to run.
            activity: what it does, as in "watching the ranks failed".
        """
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, activity))
        return task

    async def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when all tasks have ended, those that start meanwhile too, or when the time is up."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._tasks:
                    await asyncio.wait(tuple(self._tasks))
        except TimeoutError:
            pass

    def cancel(self) -> None:
        """Cancel every task that has not ended."""
        for task in tuple(self._tasks):
            task.cancel()

    def _ended(self, activity: str, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.exception("%s failed", activity, exc_info=error)


async def keep_doing(
    activity: str,
    action: Callable[[], Awaitable[None]],
    pause: Callable[[], Awaitable[object]],
    retry_seconds: float = RETRY_SECONDS,
) -> NoReturn:
    """Do something again and again until cancelled, whatever goes wrong.

    Args:
        activity: what is done, as in "cannot claim jobs".
        action: to do.
        pause: waits after a success.
        retry_seconds: to wait after a failure.
    """
    outage = Outage(logger, activity)
    while True:
        try:
            await action()
            outage.note_success()
            await pause()
            # A pause that is over at once must not keep the event loop from everything else.
            await asyncio.sleep(0)
        except Exception as error:
            outage.note_failure(error)
            await asyncio.sleep(retry_seconds)


class Outage:
    """Whether an activity fails at the moment: one line in the log when that begins, one when it is over.

    Args:
        log: the logger of the module that does it.
        activity: what cannot be done, as in "cannot claim jobs".
    """

    def __init__(self, log: logging.Logger, activity: str) -> None:
        self._log = log
        self._activity = activity
        self._has_begun = False

    def note_failure(self, error: Exception) -> None:
        """Log the first failure since the last success; with a traceback when it is no HiDreamError."""
        if self._has_begun:
            return
        self._has_begun = True
        exc_info = None if isinstance(error, HiDreamError) else error
        # An outage of the artifact store has its own line, whatever fails by it.
        level = logging.INFO if isinstance(error, ArtifactUnavailableError) else logging.WARNING
        text = "cannot %s: %s; trying again"
        self._log.log(level, text, self._activity, reason_of(error), exc_info=exc_info)

    def note_success(self) -> None:
        """Log that the activity works again, if it did not."""
        if self._has_begun:
            self._has_begun = False
            self._log.info("can %s again", self._activity)


def reason_of(error: Exception) -> str:
    """The error's text and, in parentheses, the first line of what caused it."""
    if not isinstance(error, HiDreamError):
        return str(error) or type(error).__name__
    return f"{error} ({cause_of(error)})" if error.__cause__ is not None else str(error)


def cause_of(error: BaseException) -> str:
    """The first line of what caused an error, in the words of whoever said it first."""
    cause = error.__cause__ or error
    # What SQLAlchemy wraps says it more shortly, and what its adapter of a driver wraps shorter still.
    if wrapped := getattr(cause, "orig", None):
        cause = wrapped.__cause__ or wrapped
    return next(iter(str(cause).splitlines()), "") or type(cause).__name__
