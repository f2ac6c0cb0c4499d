"""Claims of jobs, each change within a transaction of the caller's."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import ClaimLostError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.records import HeldClaim
from hidream_grpc.jobs.store.rows import job_of


async def claim_next(
    connection: AsyncConnection,
    replica_id: str,
    lease_seconds: float,
    max_running_jobs_of_caller: int | None,
    is_sqlite: bool,
) -> Job | None:
    """Claim the next job, or end it where it is to be cancelled or too late; None when none waits."""
    row = (await connection.execute(queries.next_job(max_running_jobs_of_caller))).one_or_none()
    if row is None:
        return None
    job = job_of(row)
    if row.is_late or job.cancel_reason is not None:
        reason = job.cancel_reason or CancelReason.DEADLINE
        job = job.cancelled_unclaimed(reason, time.time())
        await connection.execute(queries.write_ended_unclaimed(row.number, job))
        return job
    await connection.execute(queries.claim(row.number, replica_id, lease_seconds))
    if job.state is JobState.QUEUED:
        await connection.execute(queries.take_turn(job.submission.caller, is_sqlite))
    return replace(job, claim_number=job.claim_number + 1)


async def renew(
    connection: AsyncConnection, replica_id: str, job_ids: Collection[str], lease_seconds: float
) -> tuple[HeldClaim, ...]:
    """Prolong the leases of those of the jobs that the replica still has, and return these."""
    await connection.execute(queries.renew(replica_id, job_ids, lease_seconds))
    rows = (await connection.execute(queries.held(replica_id, job_ids))).all()
    return tuple(
        HeldClaim(
            row.job_id,
            row.claim_number,
            None if row.cancel_reason is None else CancelReason(row.cancel_reason),
            row.deadline_time,
        )
        for row in rows
    )


async def save(connection: AsyncConnection, job: Job) -> bool:
    """Write a claimed job; False when it is there already, which may be for the end of a job only.

    Raises:
        ClaimLostError: somebody else has the job, or it was given back, has ended or was deleted.
    """
    write = queries.write_ended_claimed if job.state.has_ended else queries.write_claimed
    if (await connection.execute(write(job))).rowcount:
        return True
    if await _is_written_end(connection, job):
        return False
    raise ClaimLostError(job.job_id, job.claim_number)


async def release(connection: AsyncConnection, job: Job) -> Job:
    """Give a claimed job back, or end it if that was asked for; returns it as it is then.

    Raises:
        ClaimLostError: as `save`.
    """
    row = (await connection.execute(queries.by_job_id(None, job.job_id, for_update=True))).one_or_none()
    is_held = row is not None and row.replica_id is not None and row.end_time is None
    if row is None or not is_held or row.claim_number != job.claim_number:
        raise ClaimLostError(job.job_id, job.claim_number)
    kept = job_of(row)
    released = replace(job.requeued(), cancel_reason=kept.cancel_reason, deadline_time=kept.deadline_time)
    if released.cancel_reason is None:
        await connection.execute(queries.write_released(row.number, released))
    else:
        released = released.cancelled_unclaimed(released.cancel_reason, time.time())
        await connection.execute(queries.write_ended_unclaimed(row.number, released))
    return released


async def _is_written_end(connection: AsyncConnection, job: Job) -> bool:
    row = (await connection.execute(queries.by_job_id(None, job.job_id))).one_or_none()
    if row is None or row.end_time is None:
        return False
    return (row.claim_number, row.state, row.end_time) == (job.claim_number, job.state, job.end_time)
