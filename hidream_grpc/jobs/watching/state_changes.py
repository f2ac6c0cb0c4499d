"""Follows the states of many jobs, first as they are, then every change: for dashboards and autoscalers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Mapping

from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store import changes
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.changed_jobs import ChangedJobs, JobChange

PAGE_SIZE = 200
"""Number of jobs that are read at once, which the event loop does not interrupt."""


class StateChanges:
    """The changes that one reader gets, of the jobs that it may see.

    A change that comes while the reader is away waits for it: of each job the newest one.

    Args:
        changed_jobs: reads the jobs that change, for all readers.
        owner: only jobs of this owner; of all owners where it is None.
        states: only jobs in one of these states, and those that leave them; none for all.
        labels: only jobs that carry all of these labels.
    """

    def __init__(
        self,
        store: SqlJobStore,
        changed_jobs: ChangedJobs,
        owner: str | None,
        states: Collection[JobState],
        labels: Mapping[str, str],
    ) -> None:
        self._store = store
        self._changed_jobs = changed_jobs
        self._owner = owner
        self._states = states
        self._labels = labels
        self._known_states: dict[str, JobState] = {}
        # By job, the first that changed first; with the moment at which the read of it began.
        self._pending: dict[str, tuple[JobChange, float]] = {}
        self._is_incomplete = False
        self._ending_error: HiDreamError | None = None
        self._wake = asyncio.Event()
        # When this reader itself last read jobs: what was read before may be older than what it has seen.
        self._own_read_end = 0.0

    async def follow(self) -> AsyncGenerator[JobChange]:
        """Yield the jobs that match, then each change of a state.

        Raises:
            HiDreamError: why it ends: the service goes away, or what the store raises.
        """
        with self._changed_jobs.followed_by(self):
            async for found in self._everything(self._states):
                yield found
            while True:
                if self._is_incomplete:
                    self._is_incomplete = False
                    self._pending.clear()
                    async for found in self._everything(()):
                        yield found
                elif self._pending:
                    change, read_start = self._pending.pop(next(iter(self._pending)))
                    if news := await self._newest(change, read_start):
                        yield news
                elif self._ending_error is not None:
                    raise self._ending_error
                else:
                    self._wake.clear()
                    await self._wake.wait()

    # --- what `ChangedJobs` calls -----------------------------------------------------------------

    def offer(self, change: JobChange, read_start: float) -> None:
        """Keep a job that was read for this reader, where it may see it and its state is news."""
        job = change.job
        if self._is_incomplete or not self._may_see(job):
            return
        is_newest = read_start > self._own_read_end and job.job_id not in self._pending
        if is_newest and not self._would_be_news(job):
            self._known_states[job.job_id] = job.state
            return
        self._pending[job.job_id] = (change, read_start)
        if len(self._pending) > changes.MAX_PENDING_CHANGES:
            self.read_everything()
        self._wake.set()

    def forget(self, job_id: str) -> None:
        """Note that a job was deleted."""
        self._pending.pop(job_id, None)
        self._known_states.pop(job_id, None)

    def read_everything(self) -> None:
        """Have this reader read all jobs again: changes were missed."""
        self._is_incomplete = True
        self._pending.clear()
        self._wake.set()

    def end(self, error: HiDreamError) -> None:
        """End with an error, after what was offered."""
        self._ending_error = error
        self._wake.set()

    # ----------------------------------------------------------------------------------------------

    async def _everything(self, states: Collection[JobState]) -> AsyncGenerator[JobChange]:
        page_token, seen = "", set[str]()
        while True:
            page = await self._store.list(self._owner, states, self._labels, PAGE_SIZE, page_token)
            self._own_read_end = time.monotonic()
            for job in page.jobs:
                seen.add(job.job_id)
                if self._is_news(job):
                    yield JobChange(job, job.end_time or job.start_time or job.create_time)
            page_token = page.next_page_token
            if not page_token:
                break
        for deleted in self._known_states.keys() - seen:
            del self._known_states[deleted]

    async def _newest(self, change: JobChange, read_start: float) -> JobChange | None:
        """The change, with the job read again where this reader may know a newer one; None if no news."""
        if read_start <= self._own_read_end:
            jobs = await self._store.get_readable([change.job.job_id])
            self._own_read_end = time.monotonic()
            if not jobs:
                return None
            change = JobChange(jobs[0], jobs[0].end_time or self._store.clock.now())
        return change if self._is_news(change.job) else None

    def _may_see(self, job: Job) -> bool:
        labels = job.submission.labels
        return self._owner in (None, job.owner) and all(
            labels.get(key) == value for key, value in self._labels.items()
        )

    def _is_news(self, job: Job) -> bool:
        is_news = self._would_be_news(job)
        self._known_states[job.job_id] = job.state
        return is_news

    def _would_be_news(self, job: Job) -> bool:
        before = self._known_states.get(job.job_id)
        is_asked_for = not self._states or job.state in self._states or before in self._states
        return before is not job.state and is_asked_for
