"""Accepts jobs, all or none, within one transaction, and tries out whether that would work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import (
    CallerQueueFullError,
    QueueFullError,
    RequestError,
    RequestIdConflictError,
)
from hidream_grpc.jobs.job import Job, JobState, Submission, asks_for_the_same
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.changes import job_added
from hidream_grpc.jobs.store.database import Database, Lock
from hidream_grpc.jobs.store.failures import TransactionConflict
from hidream_grpc.jobs.store.records import AttachedCall, QueueLimits
from hidream_grpc.jobs.store.rows import NOTHING_KNOWN, job_of, new_row


class JobAcceptance(StoreBase):
    """Calls that accept jobs, or try out whether that would work."""

    @uninterrupted
    async def add(
        self,
        new_jobs: Sequence[Job],
        limits: QueueLimits,
        attached_call: AttachedCall | None = None,
        refusal: RequestError | None = None,
    ) -> tuple[Job, ...]:
        """Accept all jobs of one owner, or none.

        Where a job's request id is held by an earlier job, that one is returned in its place, whatever its
        state, and it keeps the later of both deadlines. Jobs that FAILED or were CANCELLED hold their
        request id no more.

        Args:
            new_jobs: QUEUED, of one owner, with job ids of their own.
            limits: how many may wait afterwards, for the same model; earlier jobs do not count as new.
            attached_call: the caller that waits for the job, where there is one; see `detach`.
            refusal: why none of the jobs can be new; earlier jobs are returned all the same.

        Returns:
            A job for each one given: it is new where the job id is the same.

        Raises:
            RequestIdConflictError: a request id is held by a job that asks for something else.
            QueueFullError, CallerQueueFullError: too many jobs wait.
            RequestError: the refusal, where not all requests have earlier jobs.
        """
        if not new_jobs:
            return ()
        async with self._database.write() as connection:
            accepted = await _accept(self._database, connection, new_jobs, limits, attached_call, refusal)
            pairs = zip(new_jobs, accepted, strict=True)
            changes = [job_added(job) for new, job in pairs if new.job_id == job.job_id]
            await self._notify(connection, changes)
        self._committed(changes)
        return accepted

    @uninterrupted
    async def probe(self, replica_id: str, is_in_doubt: bool) -> None:
        """Do everything that it takes to accept and claim a job, and undo it.

        Args:
            replica_id: of this replica.
            is_in_doubt: also write a little that lasts: what is undone needs no room in a file.
        """
        async with self._database.write() as connection:
            await _try_out(connection, replica_id, self._database.is_sqlite)
            await connection.rollback()
        if is_in_doubt:
            async with self._database.write() as connection:
                await connection.execute(queries.beat(replica_id))


async def _accept(
    database: Database,
    connection: AsyncConnection,
    new_jobs: Sequence[Job],
    limits: QueueLimits,
    attached_call: AttachedCall | None,
    refusal: RequestError | None,
) -> tuple[Job, ...]:
    """Insert the jobs whose request ids are free; see `JobAcceptance.add`."""
    (owner,) = {job.owner for job in new_jobs}
    request_ids = {job.submission.request_id for job in new_jobs}
    holders: dict[str, Job] = {}
    for some in queries.batches(request_ids):
        rows = await connection.execute(queries.by_request_ids(owner, some))
        holders.update((row.request_id, job_of(row)) for row in rows)
    earlier = frozenset(holders)
    added: list[Job] = []
    for job in new_jobs:
        request_id = job.submission.request_id
        holder = holders.setdefault(request_id, job)
        is_same = asks_for_the_same(job.submission, holder.submission)
        if refusal is not None and (holder is job or not is_same):
            raise refusal
        if not is_same:
            raise RequestIdConflictError(request_id, holder.job_id)
        if request_id in earlier:
            holders[request_id] = await _with_later_deadline(connection, holder, job)
        elif holder is job:
            added.append(job)
    if added:
        # The lock is for the limits; the database itself keeps request ids unique.
        await database.lock(connection, Lock.ACCEPT)
        await _check_limits(connection, added, limits)
        await _insert(connection, added)
    accepted = tuple(holders[job.submission.request_id] for job in new_jobs)
    if attached_call is None:
        return accepted
    (job,) = accepted
    return (await _attach(connection, job, attached_call),)


async def _try_out(connection: AsyncConnection, replica_id: str, is_sqlite: bool) -> None:
    """Accept a job and claim it, in a transaction that is to be rolled back: no other call ever sees it.

    It takes no lock that others wait for: a server that stands still in the middle of it delays no other.
    """
    unused_id = uuid4().hex
    submission = Submission(NOTHING_KNOWN, unused_id, unused_id, labels={"": ""})
    job = Job(unused_id, submission, create_time=0.0, owner=unused_id)
    await connection.execute(queries.by_request_ids(job.owner, [submission.request_id]))
    (acceptance_number,) = await _insert(connection, [job])
    await _attach(connection, job, AttachedCall(unused_id, replica_id))
    await connection.execute(queries.claim(acceptance_number, replica_id))
    await connection.execute(queries.take_turn(unused_id, is_sqlite))


async def _attach(connection: AsyncConnection, job: Job, call: AttachedCall) -> Job:
    """Attach a caller to a job that has not ended; return the job as it is then."""
    if job.state.has_ended or job.cancel_reason is not None:
        return job
    await connection.execute(queries.attach(call.call_id, job.job_id, call.replica_id))
    # The insert has waited for a caller that stops the job at this moment, as its last one.
    row = (await connection.execute(queries.by_job_id(None, job.job_id))).one()
    attached = job_of(row)
    if attached.state in (JobState.FAILED, JobState.CANCELLED):
        # It does not hold its request id any more.
        raise TransactionConflict
    if attached.cancel_reason is not None:
        # `JobIntake` waits for its end, and then tries again with the same call.
        await connection.execute(queries.detach(call.call_id))
    return attached


async def _with_later_deadline(connection: AsyncConnection, holder: Job, job: Job) -> Job:
    """Put off the deadline of a job that a retry found to the later one; None means no deadline."""
    deadline_time = holder.deadline_time
    if holder.state.has_ended or deadline_time is None:
        return holder
    later = None if job.deadline_time is None else max(deadline_time, job.deadline_time)
    if later != deadline_time:
        await connection.execute(queries.put_deadline_off(holder.job_id, later))
    return replace(holder, deadline_time=later)


async def _check_limits(connection: AsyncConnection, added: Collection[Job], limits: QueueLimits) -> None:
    (model_fingerprint,) = {job.model_fingerprint for job in added}
    num_waiting = (await connection.execute(queries.num_waiting(model_fingerprint))).scalar_one()
    if num_waiting + len(added) > limits.max_queued_jobs:
        raise QueueFullError(limits.max_queued_jobs, limits.retry_after_seconds)
    if limits.max_queued_jobs_of_caller is not None:
        for caller, num_added in Counter(job.submission.caller for job in added).items():
            query = queries.num_waiting(model_fingerprint, caller)
            num_waiting = (await connection.execute(query)).scalar_one()
            if num_waiting + num_added > limits.max_queued_jobs_of_caller:
                raise CallerQueueFullError(
                    caller, limits.max_queued_jobs_of_caller, limits.retry_after_seconds
                )


async def _insert(connection: AsyncConnection, added: Collection[Job]) -> Sequence[int]:
    """Insert jobs and their labels; return their acceptance numbers."""
    numbers = (await connection.execute(queries.add_jobs(), [new_row(job) for job in added])).scalars().all()
    labels = [
        row
        for number, job in zip(numbers, added, strict=True)
        for row in queries.label_rows(number, job.submission.labels)
    ]
    if labels:
        await connection.execute(queries.add_labels(), labels)
    return numbers
