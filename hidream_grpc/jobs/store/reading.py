"""Reads jobs: one, many, a page, their numbers, and the order in which they wait."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import JobInternalError, JobNotFoundError
from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.claims import loads_of
from hidream_grpc.jobs.store.order import CallerLoads, WaitingJob
from hidream_grpc.jobs.store.page_token import decode_page_token, encode_page_token, filter_digest_of
from hidream_grpc.jobs.store.records import Page, QueuedJob
from hidream_grpc.jobs.store.rows import job_of

_STATES = frozenset(state.value for state in JobState)


class JobReading(StoreBase):
    """Calls that change nothing."""

    @uninterrupted
    async def get(self, owner: str | None, job_id: str) -> Job:
        """Read a job of an owner; of any owner where it is None.

        Raises:
            JobNotFoundError: there is no such job, or it is another owner's.
            JobInternalError: its row cannot be read, and the claim that ends it has not come yet.
        """
        async with self._database.read() as connection:
            return readable(await row_of(connection, owner, job_id))

    @uninterrupted
    async def get_all(self, job_ids: Collection[str]) -> tuple[Job, ...]:
        """Read those of the jobs that exist, in any order."""
        found: list[Job] = []
        async with self._database.read() as connection:
            for some in queries.batches(job_ids):
                found.extend(map(job_of, await connection.execute(queries.by_job_ids(some))))
        return tuple(found)

    @uninterrupted
    async def get_readable(self, job_ids: Collection[str]) -> tuple[Job, ...]:
        """Read those of the jobs that exist, but for those whose row was just found unreadable, in any order.

        Such a job is shown once it has ended.
        """
        found: list[Job] = []
        async with self._database.read() as connection:
            for some in queries.batches(job_ids):
                for row in await connection.execute(queries.by_job_ids(some)):
                    with contextlib.suppress(JobInternalError):
                        found.append(readable(row))
        return tuple(found)

    @uninterrupted
    async def held_request_ids(self, owner: str, request_ids: Collection[str]) -> frozenset[str]:
        """Find which of the request ids jobs of the owner hold."""
        held: set[str] = set()
        async with self._database.read() as connection:
            for some in queries.batches(request_ids):
                held.update(
                    row.request_id for row in await connection.execute(queries.by_request_ids(owner, some))
                )
        return frozenset(held)

    @uninterrupted
    async def list(
        self,
        owner: str | None,
        states: Collection[JobState] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
        page_token: str = "",
    ) -> Page:
        """Read jobs in one of the states (none: all) that carry all of the labels, newest first.

        A page token stays valid, whatever is added or removed meanwhile.

        Raises:
            InvalidRequestError: this service did not make the token, or made it for another filter.
        """
        labels = labels or {}
        filter_digest = filter_digest_of(owner, frozenset(states), labels)
        before = decode_page_token(page_token, filter_digest) if page_token else None
        async with self._database.read() as connection:
            query = queries.page(owner, states, labels, before, page_size + 1)
            rows = (await connection.execute(query)).all()
        shown = rows[:page_size]
        has_more = len(rows) > page_size
        next_page_token = encode_page_token(shown[-1].acceptance_number, filter_digest) if has_more else ""
        return Page(tuple(map(job_of, shown)), next_page_token)

    @uninterrupted
    async def counts(self) -> Counter[JobState]:
        """Count the jobs that have not ended by state."""
        async with self._database.read() as connection:
            rows = (await connection.execute(queries.counts())).all()
        # Another version of the service may know more states.
        return Counter({JobState(state): count for state, count in rows if state in _STATES})

    @uninterrupted
    async def waiting_among(self, job_ids: Collection[str]) -> tuple[QueuedJob, ...]:
        """Read those of the jobs that wait and were not begun, in the order of acceptance."""
        found: list[QueuedJob] = []
        async with self._database.read() as connection:
            for some in queries.batches(job_ids):
                found.extend(map(_queued_job, await connection.execute(queries.waiting_among(some))))
        return tuple(sorted(found, key=lambda queued: queued.waiting.acceptance_number))

    @uninterrupted
    async def waiting_after(self, acceptance_number: int, limit: int) -> tuple[QueuedJob, ...]:
        """Read jobs that wait and were not begun, accepted after a number, in the order of acceptance."""
        async with self._database.read() as connection:
            query = queries.waiting_after(acceptance_number, limit)
            return tuple(map(_queued_job, await connection.execute(query)))

    @uninterrupted
    async def caller_loads(
        self, model_fingerprint: str, max_running_jobs_of_caller: int | None = None
    ) -> CallerLoads:
        """Read when each caller last had a turn, and how many of its jobs run where that is limited."""
        async with self._database.read() as connection:
            return await loads_of(connection, model_fingerprint, max_running_jobs_of_caller)

    @uninterrupted
    async def overdue(self, limit: int = 100) -> tuple[str, ...]:
        """Ids of jobs whose deadline has passed: `request_cancel` each with CancelReason.DEADLINE."""
        async with self._database.read() as connection:
            return tuple(
                (await connection.execute(queries.overdue(self.clock.cautious_now(), limit))).scalars()
            )


def _queued_job(row: Row[Any]) -> QueuedJob:
    waiting = WaitingJob(row.acceptance_number, row.job_id, row.caller, row.priority)
    return QueuedJob(waiting, job_of(row))


def readable(row: Row[Any]) -> Job:
    """The job of a row that was not found unreadable; raises JobInternalError for one that just was."""
    job = job_of(row)
    if job.is_unreadable and row.end_time is None and job.error is not None:
        raise job.error
    return job


async def row_of(
    connection: AsyncConnection, owner: str | None, job_id: str, for_update: bool = False
) -> Row[Any]:
    """The row of a job of an owner, of anybody where that is None; raises JobNotFoundError."""
    query = queries.by_job_id(owner, job_id, for_update)
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    if row is None:
        raise JobNotFoundError(job_id)
    return row
