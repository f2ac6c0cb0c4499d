"""Follows the states of many jobs, first as they are, then every change: for dashboards and autoscalers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping
from dataclasses import dataclass

from hidream_grpc.errors import HiDreamError, JobInternalError, JobNotFoundError
from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store.changes import Change, ChangeKind, Subscription
from hidream_grpc.jobs.store.store import SqlJobStore

PAGE_SIZE = 1000


@dataclass(frozen=True, slots=True)
class JobChange:
    """A job as it is after a change, and when that was, in seconds since the epoch."""

    job: Job
    time: float


class StateChanges:
    """The changes that one reader gets, of the jobs that it may see.

    Args:
        owner: only jobs of this owner; of all owners where it is None.
        states: only jobs in one of these states, and those that leave them; none for all.
        labels: only jobs that carry all of these labels.
    """

    def __init__(
        self,
        store: SqlJobStore,
        owner: str | None,
        states: Collection[JobState],
        labels: Mapping[str, str],
    ) -> None:
        self._store = store
        self._owner = owner
        self._states = states
        self._labels = labels
        self._known_states: dict[str, JobState] = {}

    async def follow(self, closed: asyncio.Event, closing_error: HiDreamError) -> AsyncGenerator[JobChange]:
        """Yield the jobs that match, then each change of a state, until `closed` is set.

        Raises:
            HiDreamError: the closing error, or what the store raises.
        """
        with self._store.subscribe() as changes:
            async for found in self._everything(self._states):
                yield found
            while change := await _next_unless(closed, changes):
                if change.kind is ChangeKind.ANYTHING:
                    async for found in self._everything(()):
                        yield found
                elif change.kind in (ChangeKind.ADDED, ChangeKind.CHANGED):
                    if news := await self._news_of(change.job_id):
                        yield news
                elif change.kind is ChangeKind.DELETED:
                    self._known_states.pop(change.job_id, None)
        raise closing_error

    async def _everything(self, states: Collection[JobState]) -> AsyncGenerator[JobChange]:
        page_token, seen = "", set[str]()
        while True:
            page = await self._store.list(self._owner, states, self._labels, PAGE_SIZE, page_token)
            for job in page.jobs:
                seen.add(job.job_id)
                if self._is_news(job):
                    yield JobChange(job, job.end_time or job.start_time or job.create_time)
            page_token = page.next_page_token
            if not page_token:
                break
        for deleted in self._known_states.keys() - seen:
            del self._known_states[deleted]

    async def _news_of(self, job_id: str) -> JobChange | None:
        try:
            job = await self._store.get(self._owner, job_id)
        except (JobNotFoundError, JobInternalError):
            # A job with an unreadable row is shown once it has ended.
            return None
        if any(job.submission.labels.get(key) != value for key, value in self._labels.items()):
            return None
        return JobChange(job, job.end_time or self._store.clock.now()) if self._is_news(job) else None

    def _is_news(self, job: Job) -> bool:
        before = self._known_states.get(job.job_id)
        self._known_states[job.job_id] = job.state
        is_asked_for = not self._states or job.state in self._states or before in self._states
        return before is not job.state and is_asked_for


async def _next_unless(closed: asyncio.Event, changes: Subscription) -> Change | None:
    """The next change; None once `closed` is set."""
    coming = asyncio.ensure_future(anext(changes))
    closing = asyncio.create_task(closed.wait())
    try:
        await asyncio.wait((coming, closing), return_when=asyncio.FIRST_COMPLETED)
        return coming.result() if coming.done() else None
    finally:
        coming.cancel()
        closing.cancel()
