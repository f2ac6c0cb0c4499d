"""Claims of jobs: a replica takes a job, writes what it makes of it, and ends it or gives it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum

from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import ClaimLostError, JobInternalError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.changes import given_back, row_changed
from hidream_grpc.jobs.store.database import Lock
from hidream_grpc.jobs.store.order import TURNS_PER_OLDEST, CallerLoads, ClaimOrder, WaitingJob, claim_order
from hidream_grpc.jobs.store.records import HeldClaim
from hidream_grpc.jobs.store.rows import failed_columns, job_of
from hidream_grpc.jobs.store.step_room import StepDemand, StepRoom

MAX_CLAIM_ROUNDS = 10
"""How often one call tries again while it only ends jobs and claims none."""


class Saved(Enum):
    """What became of a job that was to be written."""

    WRITTEN = "written"
    WAS_WRITTEN = "was written before"
    IS_TO_BE_CANCELLED = "is to be cancelled"
    """The job was to end otherwise; nothing was written."""


class JobClaims(StoreBase):
    """Calls of the replicas that run jobs."""

    @uninterrupted
    async def claim(
        self,
        replica_id: str,
        model_fingerprint: str,
        limit: int,
        max_running_jobs_of_caller: int | None = None,
        room: Callable[[], StepRoom] | None = None,
    ) -> tuple[Job, ...]:
        """Take jobs of a model to run: those that lost their replica, then in the order of `claim_order`.

        Of the first `limit` jobs those are taken for which there is room: `room` gives what there is, anew
        for each try. Without it all of them are taken.

        Claims of all replicas are made one after another. A claimed job is as it was left, QUEUED or
        RUNNING, with a claim number of its own. Jobs that are to be cancelled, too late, or unreadable end
        here instead: ask again when fewer come than were asked for.
        """
        for _ in range(MAX_CLAIM_ROUNDS):
            jobs = await self._claim_some(
                replica_id,
                model_fingerprint,
                limit,
                max_running_jobs_of_caller,
                None if room is None else room(),
            )
            claimed = tuple(job for job in jobs if not job.state.has_ended)
            if claimed or not jobs:
                return claimed
        return ()

    @uninterrupted
    async def held(self, replica_id: str) -> tuple[HeldClaim, ...]:
        """The claims that a replica has according to the store."""
        async with self._database.read() as connection:
            rows = (await connection.execute(queries.held(replica_id))).all()
        return tuple(
            HeldClaim(
                row.job_id,
                row.claim_number,
                None if row.cancel_reason is None else _reason_of(row.cancel_reason),
            )
            for row in rows
        )

    @uninterrupted
    async def abandon(self, replica_id: str, claim: HeldClaim) -> None:
        """Give back a job that its replica does not know; nothing happens if the replica has it no more."""
        change = given_back(claim.job_id, claim.claim_number)
        async with self._database.write() as connection:
            query = queries.abandon(replica_id, claim.job_id, claim.claim_number)
            if (await connection.execute(query)).rowcount:
                await self._notify(connection, [change])
        self._committed([change])

    @uninterrupted
    async def save(self, job: Job, *, is_news: bool = True) -> Saved:
        """Write a job as the replica that has it knows it; where the job has ended, so does the claim.

        A job that is to be cancelled ends as CANCELLED alone: any other end is not written then.

        `cancel_reason` and `deadline_time` of a job that has not ended are not written: other calls do that.
        To write the same end again, after a StoreUnavailableError, is no error.

        Args:
            job: to write.
            is_news: whether subscribers hear of it: none needs what only the next claim reads.

        Raises:
            ClaimLostError: another claim has the job, or it was given back, has ended or was deleted.
        """
        changes = [row_changed(job)] if is_news else []
        async with self._database.write() as connection:
            saved = await _save(connection, job)
            if saved is Saved.WRITTEN:
                await self._notify(connection, changes)
        if saved is Saved.WRITTEN:
            self._committed(changes, job)
        elif saved is Saved.WAS_WRITTEN:
            # By the call before, whose answer was lost.
            self._note_end(job)
        return saved

    @uninterrupted
    async def release(self, job: Job) -> Job:
        """Give a job back: QUEUED with its images and snapshot, or CANCELLED where that was asked for.

        Raises:
            ClaimLostError: as `save`.
        """
        change = given_back(job.job_id, job.claim_number)
        async with self._database.write() as connection:
            released = await _release(connection, job, self.clock.now())
            await self._notify(connection, [change])
        self._committed([change], released)
        return released

    async def _claim_some(
        self,
        replica_id: str,
        model_fingerprint: str,
        limit: int,
        max_running_jobs_of_caller: int | None,
        room: StepRoom | None,
    ) -> tuple[Job, ...]:
        async with self._database.write() as connection:
            await self._database.lock(connection, Lock.CLAIM)
            order = await _order_to_claim(connection, model_fingerprint, max_running_jobs_of_caller, limit)
            jobs = await _claim_first(
                connection,
                replica_id,
                order,
                self.clock.cautious_now(),
                self._database.is_sqlite,
                limit,
                room,
            )
            changes = [row_changed(job) for job in jobs]
            await self._notify(connection, changes)
        for job, change in zip(jobs, changes, strict=True):
            self._committed([change], job)
        return jobs


async def _order_to_claim(
    connection: AsyncConnection,
    model_fingerprint: str,
    max_running_jobs_of_caller: int | None,
    max_claims: int,
) -> ClaimOrder:
    """The order of a model's unclaimed jobs, as far as so many claims need it."""
    query = queries.first_to_claim(model_fingerprint, max_claims)
    waiting = [WaitingJob(*row) for row in await connection.execute(query)]
    if not waiting:
        return ClaimOrder((), ())
    return claim_order(waiting, await loads_of(connection, model_fingerprint, max_running_jobs_of_caller))


async def loads_of(
    connection: AsyncConnection, model_fingerprint: str, max_running_jobs_of_caller: int | None
) -> CallerLoads:
    """The turns of callers, how many of their jobs run where that is limited, and a model's newest start."""
    last_turns = {row.caller: row.last_turn for row in await connection.execute(queries.last_turns())}
    num_running: dict[str, int] = {}
    if max_running_jobs_of_caller is not None:
        rows = await connection.execute(queries.num_running_by_caller())
        num_running = {row.caller: row.num_running for row in rows}
    newest_start = (await connection.execute(queries.newest_start(model_fingerprint))).scalar_one_or_none()
    return CallerLoads(last_turns, num_running, max_running_jobs_of_caller, newest_start or 0)


async def _claim_first(
    connection: AsyncConnection,
    replica_id: str,
    order: ClaimOrder,
    now: float,
    is_sqlite: bool,
    limit: int,
    room: StepRoom | None,
) -> tuple[Job, ...]:
    """Claim those of the first jobs of an order for which there is room.

    Those among them that are to be cancelled, too late or unreadable end.
    """
    chosen = order.claimable[:limit]
    if not chosen:
        return ()
    query = queries.to_claim([waiting.acceptance_number for waiting in chosen])
    rows = {row.acceptance_number: row for row in await connection.execute(query)}
    claimed: list[Job] = []
    has_passed_over = is_due_held_back = False
    next_turn = order.next_turn
    for number in (waiting.acceptance_number for waiting in chosen if waiting.acceptance_number in rows):
        job = job_of(rows[number])
        if job.is_unreadable:
            assert isinstance(job.error, JobInternalError)
            await connection.execute(queries.write(number, failed_columns(job, job.error, now)))
        elif (reason := _reason_to_end(job, now)) is not None:
            job = job.cancelled_unclaimed(reason, now)
            await connection.execute(queries.write_ended_unclaimed(number, job))
        else:
            # The turn of one behind a job that does not start has not come.
            is_due = job.job_id in order.due and not has_passed_over
            takes_turn = job.state is JobState.QUEUED and not is_due_held_back
            if has_passed_over and takes_turn and claimed and next_turn % TURNS_PER_OLDEST == 0:
                # It is the turn of the oldest, by a new order.
                break
            if room is not None and not room.take(StepDemand.of_waiting(job), is_due=is_due):
                has_passed_over = True
                # It keeps its turn until as many jobs run as may.
                is_due_held_back |= is_due
                continue
            await connection.execute(queries.claim(number, replica_id))
            if takes_turn:
                await connection.execute(queries.take_turn(job.submission.caller, is_sqlite))
                next_turn += 1
            job = replace(job, claim_number=job.claim_number + 1)
        claimed.append(job)
    return tuple(claimed)


async def _save(connection: AsyncConnection, job: Job) -> Saved:
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


async def _release(connection: AsyncConnection, job: Job, now: float) -> Job:
    """Give a claimed job back, or end it where that was asked for; return it as it is then.

    Raises:
        ClaimLostError: as `_save`.
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


def _reason_to_end(job: Job, now: float) -> CancelReason | None:
    if job.cancel_reason is not None:
        return job.cancel_reason
    is_late = job.deadline_time is not None and job.deadline_time <= now
    return CancelReason.DEADLINE if is_late else None


def _reason_of(text: str) -> CancelReason:
    """The reason to cancel a job; one that only another version of the service knows is REQUESTED."""
    try:
        return CancelReason(text)
    except ValueError:
        return CancelReason.REQUESTED
