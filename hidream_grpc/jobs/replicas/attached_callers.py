"""Callers that wait for their jobs: when the last one of a job goes away, the job is stopped.

The store holds which callers wait, for all replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hidream_grpc.background import RETRY_SECONDS, BackgroundTasks, Outage
from hidream_grpc.errors import JobNotFoundError
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.retrying import wait_at_most
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)


class AttachedCallers:
    """Callers that wait for their jobs at this server.

    Args:
        closed: once it is set, no caller is detached any more: the server ends.
        on_cancelled: called with a job that was stopped, as it is then.
    """

    def __init__(
        self, store: SqlJobStore, closed: asyncio.Event, on_cancelled: Callable[[Job], None]
    ) -> None:
        self._store = store
        self._closed = closed
        self._on_cancelled = on_cancelled
        self._tasks = BackgroundTasks()

    def detach(
        self, job_id: str, call: AttachedCall, reason: CancelReason | None, after_seconds: float = 0.0
    ) -> None:
        """Note after a time that a caller waits no more; with a reason its job stops if it was the last."""
        if not self._closed.is_set():
            detaching = self._detach(job_id, call, reason, after_seconds)
            self._tasks.start(detaching, f"let a caller of job {job_id} go")

    def forget(self, call: AttachedCall) -> None:
        """Note that a caller does not wait, where its call may be stored although the answer was lost."""
        self._tasks.start(self._store.forget_call(call.call_id), "forget a caller whose answer was lost")

    async def _detach(
        self, job_id: str, call: AttachedCall, reason: CancelReason | None, after_seconds: float
    ) -> None:
        if after_seconds > 0:
            await wait_at_most(self._closed, after_seconds)
        outage = Outage(logger, f"note that a caller of job {job_id} left")
        while not self._closed.is_set():
            try:
                if (job := await self._store.detach(job_id, call, reason)) is not None:
                    self._on_cancelled(job)
                return
            except JobNotFoundError:
                return
            except Exception as error:
                outage.note_failure(error)
                await wait_at_most(self._closed, RETRY_SECONDS)
