"""Callers that wait for their jobs: when the last one of a job goes away, the job is stopped.

The store holds which callers wait, for all replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict, deque
from collections.abc import Callable

from hidream_grpc.background import RETRY_SECONDS, BackgroundTasks, Outage
from hidream_grpc.errors import JobNotFoundError
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.retrying import wait_at_most
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobFeed
from hidream_grpc.jobs.watching.feeds import JobFeeds

logger = logging.getLogger(__name__)


class AttachedCallers:
    """Callers that wait for their jobs at this server.

    Args:
        feeds: say when a job ends that a lost caller may come back to.
        max_lost_calls: lost calls of one caller that are waited for; the oldest beyond these is detached.
        closed: once it is set, no caller is detached any more: the server ends.
        on_cancelled: called with a job that was stopped, as it is then.
    """

    def __init__(
        self,
        store: SqlJobStore,
        feeds: JobFeeds,
        max_lost_calls: int,
        closed: asyncio.Event,
        on_cancelled: Callable[[Job], None],
    ) -> None:
        self._store = store
        self._feeds = feeds
        self._max_lost_calls = max_lost_calls
        self._closed = closed
        self._on_cancelled = on_cancelled
        self._tasks = BackgroundTasks()
        self._windows: defaultdict[str, deque[asyncio.Timeout]] = defaultdict(deque)

    def detach(self, job_id: str, call: AttachedCall, reason: CancelReason | None) -> None:
        """Note that a caller waits no more; with a reason its job stops if it was the last."""
        if not self._closed.is_set():
            self._tasks.start(self._detach(job_id, call, reason), f"let a caller of job {job_id} go")

    def detach_later(self, job: Job, call: AttachedCall, reason: CancelReason, window_seconds: float) -> None:
        """Detach a caller whose connection may be lost, after its window, unless the job ends before."""
        if not self._closed.is_set():
            detaching = self._detach_later(job, call, reason, window_seconds)
            self._tasks.start(detaching, f"let a caller of job {job.job_id} go")

    def forget(self, call: AttachedCall) -> None:
        """Note that a caller does not wait, where its call may be stored although the answer was lost."""
        self._tasks.start(self._store.forget_call(call.call_id), "forget a caller whose answer was lost")

    async def _detach_later(
        self, job: Job, call: AttachedCall, reason: CancelReason, window_seconds: float
    ) -> None:
        with self._feeds.used(job.job_id, is_reader=False) as feed:
            await self._wait_for_end(feed, job.submission.caller, window_seconds)
            if feed.has_ended:
                return
        await self._detach(job.job_id, call, reason)

    async def _wait_for_end(self, feed: JobFeed, caller: str, window_seconds: float) -> None:
        windows = self._windows[caller]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(window_seconds) as window:
                windows.append(window)
                if len(windows) > self._max_lost_calls:
                    _end(windows.popleft())
                try:
                    await feed.wait_for_end()
                finally:
                    with contextlib.suppress(ValueError):
                        windows.remove(window)
        if not self._windows[caller]:
            del self._windows[caller]

    async def _detach(self, job_id: str, call: AttachedCall, reason: CancelReason | None) -> None:
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


def _end(window: asyncio.Timeout) -> None:
    if not window.expired():
        window.reschedule(asyncio.get_running_loop().time())
