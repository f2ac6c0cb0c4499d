"""Calls that go on to their ends when their callers are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class RunningCalls:
    """Calls that have begun and not ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def finish(
        self, call: Coroutine[Any, Any, Result], if_left: Callable[[Result], None] | None = None
    ) -> Result:
        """Run a call to its end; a caller that is cancelled meanwhile goes at once, and its call goes on.

        Args:
            call: the call to run.
            if_left: called with the result that the caller did not wait for.
        """
        task = asyncio.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if if_left is not None:
                task.add_done_callback(lambda _: _hand_over(task, if_left))
            raise

    async def wait(self, timeout_seconds: float) -> None:
        """Return when all that have begun have ended, or the time is over."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)


def _hand_over(task: asyncio.Task[Result], receive: Callable[[Result], None]) -> None:
    if not task.cancelled() and task.exception() is None:
        receive(task.result())
