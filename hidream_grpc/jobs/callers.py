"""Who stays with a job: when its last caller goes away, the job is stopped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from hidream_grpc.errors import HiDreamError, StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.job import CancelReason

HEAL_SECONDS = 0.5

Cancel = Callable[[str, CancelReason], Awaitable[object]]


class PresentCallers:
    """Callers that wait for their job at this server.

    Args:
        cancel: stops a job; may raise any HiDreamError.
        closed: once it is set, nobody leaves any more: the server goes.
    """

    def __init__(self, cancel: Cancel, closed: asyncio.Event) -> None:
        self._cancel = cancel
        self._closed = closed
        self._present: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def present(self, job_id: str) -> Iterator[None]:
        """Note that a caller stays with the job until the block ends."""
        self._present[job_id] += 1
        try:
            yield
        finally:
            self._present[job_id] -= 1
            if not self._present[job_id]:
                del self._present[job_id]

    def leave(self, job_id: str, reason: CancelReason) -> None:
        """Stop a job whose caller went away, unless another one stays with it."""
        if self._present[job_id] or self._closed.is_set():
            return
        task = asyncio.create_task(self._stop(job_id, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self, job_id: str, reason: CancelReason) -> None:
        while not self._closed.is_set():
            try:
                await self._cancel(job_id, reason)
            except (StoreUnavailableError, StoreFullError):
                await asyncio.sleep(HEAL_SECONDS)
            except HiDreamError:
                return
            else:
                return
