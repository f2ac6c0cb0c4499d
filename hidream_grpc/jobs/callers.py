"""Who stays with a job: when its last caller goes away, the job is stopped."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from hidream_grpc.errors import HiDreamError, StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.job import CancelReason
from hidream_grpc.jobs.pauses import wait_at_most

HEAL_SECONDS = 0.5
ANSWER_SECONDS = 0.5
"""How long other replicas have to say that a caller of the job is with them."""

Cancel = Callable[[str, CancelReason], Awaitable[object]]


class PresentCallers:
    """Callers that wait for their job at this server.

    Args:
        cancel: stops a job; may raise any HiDreamError.
        closed: once it is set, nobody leaves any more: the server goes.
        seek: asks other replicas for a caller of a job; None where there are none.
    """

    def __init__(
        self, cancel: Cancel, closed: asyncio.Event, seek: Callable[[str], None] | None = None
    ) -> None:
        self._cancel = cancel
        self._closed = closed
        self._seek = seek
        self._sought: dict[str, asyncio.Event] = {}
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

    def are_present(self, job_id: str) -> bool:
        """Whether any caller stays with the job here."""
        return self._present[job_id] > 0

    def note_present_elsewhere(self, job_id: str) -> None:
        """Note that another replica has a caller of the job."""
        if answer := self._sought.get(job_id):
            answer.set()

    def leave(self, job_id: str, reason: CancelReason) -> None:
        """Stop a job whose caller went away, unless another one stays with it."""
        if self._present[job_id] or self._closed.is_set():
            return
        task = asyncio.create_task(self._stop(job_id, reason))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop(self, job_id: str, reason: CancelReason) -> None:
        while not self._closed.is_set():
            if await self._is_wanted(job_id):
                return
            try:
                await self._cancel(job_id, reason)
            except (StoreUnavailableError, StoreFullError):
                await asyncio.sleep(HEAL_SECONDS)
            except HiDreamError:
                return
            else:
                return

    async def _is_wanted(self, job_id: str) -> bool:
        """Whether a caller that tried again, through another connection, waits for it by now."""
        if self._seek is not None:
            answer = self._sought.setdefault(job_id, asyncio.Event())
            self._seek(job_id)
            try:
                if await wait_at_most(answer, ANSWER_SECONDS):
                    return True
            finally:
                self._sought.pop(job_id, None)
        return self.are_present(job_id)
