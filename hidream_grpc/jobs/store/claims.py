"""Claims of jobs, each change within a transaction of the caller's."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import ClaimLostError, JobInternalError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.order import CallerLoads, ClaimOrder, WaitingJob, claim_order
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.store.rows import failed_columns, job_of


async def orders_to_tell(
    connection: AsyncConnection, model_fingerprint: str, max_running_jobs_of_caller: int | None
) -> dict[str, ClaimOrder]:
    """The order of the jobs of each model that wait, by fingerprint.

    Jobs that any model may draw are among those of the given one.
    """
    waiting: dict[str, list[WaitingJob]] = {model_fingerprint: []}
    for *columns, fingerprint in await connection.execute(queries.waiting()):
        waiting.setdefault(fingerprint or model_fingerprint, []).append(WaitingJob(*columns))
    loads = await _loads(connection, max_running_jobs_of_caller)
    return {fingerprint: claim_order(jobs, loads) for fingerprint, jobs in waiting.items()}


async def order_to_claim(
    connection: AsyncConnection,
    model_fingerprint: str,
    max_running_jobs_of_caller: int | None,
    max_claims: int,
) -> ClaimOrder:
    """As much as so many claims need of the order of the jobs of a model that no replica has."""
    query = queries.first_to_claim(model_fingerprint, max_claims)
    waiting = [WaitingJob(*row) for row in await connection.execute(query)]
    if not waiting:
        return ClaimOrder((), ())
    return claim_order(waiting, await _loads(connection, max_running_jobs_of_caller))


async def _loads(connection: AsyncConnection, max_running_jobs_of_caller: int | None) -> CallerLoads:
    last_turns = {row.caller: row.last_turn for row in await connection.execute(queries.last_turns())}
    num_running: dict[str, int] = {}
    if max_running_jobs_of_caller is not None:
        rows = await connection.execute(queries.num_running_by_caller())
        num_running = {row.caller: row.num_running for row in rows}
    return CallerLoads(last_turns, num_running, max_running_jobs_of_caller)


async def claim_first(
    connection: AsyncConnection,
    replica_id: str,
    order: ClaimOrder,
    now: float,
    is_sqlite: bool,
    limit: int,
) -> tuple[Job, ...]:
    """Claim the first jobs of an order; end those that are to be cancelled, too late or unreadable."""
    chosen = order.claimable[:limit]
    if not chosen:
        return ()
    query = queries.to_claim([waiting.acceptance_number for waiting in chosen])
    rows = {row.acceptance_number: row for row in await connection.execute(query)}
    claimed: list[Job] = []
    for number in (waiting.acceptance_number for waiting in chosen if waiting.acceptance_number in rows):
        job = job_of(rows[number])
        if job.is_unreadable:
            assert isinstance(job.error, JobInternalError)
            await connection.execute(queries.write(number, failed_columns(job, job.error, now)))
        elif (reason := _reason_to_end(job, now)) is not None:
            job = job.cancelled_unclaimed(reason, now)
            await connection.execute(queries.write_ended_unclaimed(number, job))
        else:
            await connection.execute(queries.claim(number, replica_id))
            if job.state is JobState.QUEUED:
                await connection.execute(queries.take_turn(job.submission.caller, is_sqlite))
            job = replace(job, claim_number=job.claim_number + 1)
        claimed.append(job)
    return tuple(claimed)


class Saved(Enum):
    """What became of a job that was to be written."""

    WRITTEN = "written"
    WAS_WRITTEN = "was written before"
    IS_TO_BE_CANCELLED = "is to be cancelled"
    """It was to end otherwise; nothing was written."""


async def save(connection: AsyncConnection, job: Job) -> Saved:
    """Write a claimed job; a job that is to be cancelled ends in no other way.

    Raises:
        ClaimLostError: another claim has the job, or it was given back, has ended or was deleted.
    """
    write = queries.write_ended_claimed if job.state.has_ended else queries.write_claimed
    if (await connection.execute(write(job))).rowcount:
        return Saved.WRITTEN
    row = (await connection.execute(queries.by_job_id(None, job.job_id))).one_or_none()
    if row is not None and row.claim_number == job.claim_number:
        if row.end_time is None and row.replica_id is not None and row.cancel_reason is not None:
            return Saved.IS_TO_BE_CANCELLED
        if (row.state, row.end_time) == (job.state, job.end_time):
            return Saved.WAS_WRITTEN
    raise ClaimLostError(job.job_id, job.claim_number)


async def release(connection: AsyncConnection, job: Job, now: float) -> Job:
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
        await connection.execute(queries.write_released(row.acceptance_number, released))
    else:
        released = released.cancelled_unclaimed(released.cancel_reason, now)
        await connection.execute(queries.write_ended_unclaimed(row.acceptance_number, released))
    return released


async def detach(connection: AsyncConnection, acceptance_number: int, call: AttachedCall) -> bool:
    """Note that a caller waits no more; returns whether it was the last one that waited."""
    await connection.execute(queries.detach(call.call_id))
    return (await connection.execute(queries.num_attached(acceptance_number))).scalar_one() == 0


def _reason_to_end(job: Job, now: float) -> CancelReason | None:
    if job.cancel_reason is not None:
        return job.cancel_reason
    is_late = job.deadline_time is not None and job.deadline_time <= now
    return CancelReason.DEADLINE if is_late else None
