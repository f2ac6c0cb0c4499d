"""The truth about jobs: what is in here survives every process."""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.errors import (
    JobNotEndedError,
    JobNotFoundError,
    RequestError,
    StoreFullError,
    StoreUnavailableError,
)
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import claims, queries
from hidream_grpc.jobs.store.acceptance import accept, try_out
from hidream_grpc.jobs.store.changes import (
    CHANNEL,
    MAX_PAYLOAD_BYTES,
    Change,
    ChangeHub,
    ChangeKind,
    PostgresListener,
    Subscription,
    to_text,
)
from hidream_grpc.jobs.store.claims import Saved
from hidream_grpc.jobs.store.clock import StoreClock
from hidream_grpc.jobs.store.database import Database, Lock
from hidream_grpc.jobs.store.failures import UNAVAILABLE_RETRY_SECONDS, TransactionConflict
from hidream_grpc.jobs.store.page_token import decode_page_token, encode_page_token, filter_digest_of
from hidream_grpc.jobs.store.records import (
    AttachedCall,
    EndedJob,
    HeldClaim,
    Page,
    QueueLimits,
    ReplicaRecord,
    Usage,
)
from hidream_grpc.jobs.store.rows import job_of
from hidream_grpc.jobs.uninterrupted import RunningCalls

MAX_CLAIM_ROUNDS = 10
"""Of one call, in which jobs may end and none be claimed."""
MAX_CONFLICTS = 20
MAX_CONFLICT_SECONDS = 0.05
CLOSE_SECONDS = 1.0

_STATES = frozenset(state.value for state in JobState)

P = ParamSpec("P")
Result = TypeVar("Result")


def _uninterrupted(
    method: Callable[Concatenate[SqlJobStore, P], Coroutine[Any, Any, Result]], /
) -> Callable[Concatenate[SqlJobStore, P], Coroutine[Any, Any, Result]]:
    """A method that goes on to its end when its caller is cancelled, and begins anew after a conflict.

    SQLite's driver works in a thread, which a cancellation does not reach: a transaction that is left in
    the middle keeps the database locked for all others.
    """

    async def run(self: SqlJobStore, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            result = await begin_anew(self, *args, **kwargs)
        except (StoreUnavailableError, StoreFullError) as error:
            self.observe_call(method.__name__, error)
            raise
        # A claim of nothing has written nothing.
        if result != ():
            self.observe_call(method.__name__, None)
        return result

    async def begin_anew(self: SqlJobStore, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        for _ in range(MAX_CONFLICTS):
            try:
                return await method(self, *args, **kwargs)
            except TransactionConflict:
                # Two that undo each other must not begin again at the same moment.
                await asyncio.sleep(random.uniform(0, MAX_CONFLICT_SECONDS))
        raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS)

    @functools.wraps(method)
    async def call(self: SqlJobStore, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return await self._calls.finish(run(self, *args, **kwargs))

    return call


class SqlJobStore:
    """Jobs in SQLite or PostgreSQL. What a method changed is durable when it returns.

    Every method may raise StoreUnavailableError (after a write: whether it was made is not known) or
    StoreFullError (nothing was changed); the store heals without being opened again. A call whose caller
    is cancelled goes on to its end: the caller does not know what became of it.

    Attributes:
        observe_call: is told the name of each method that was called, and what the database refused it with.
    """

    def __init__(self, location: Path | str) -> None:
        """Know a store, without a connection to it.

        Args:
            location: the file of a SQLite database, or a URL as `--store` has it, see `parse_store_url`.

        Raises:
            ConfigurationError: what is wrong with the URL.
        """
        self._database = Database(location)
        self._hub = ChangeHub()
        self._calls = RunningCalls()
        is_sqlite = self._database.is_sqlite
        self._listener = None if is_sqlite else PostgresListener(self._database, self._hub)
        self._num_ended: Counter[JobState] = Counter()
        self.clock = StoreClock()
        self.observe_call: Callable[[str, StoreUnavailableError | StoreFullError | None], None] = (
            lambda name, error: None
        )

    @property
    def is_shared(self) -> bool:
        """Whether other replicas may work on the same jobs."""
        return not self._database.is_sqlite

    def num_ended(self, state: JobState) -> int:
        """Jobs that this process ended in a state."""
        return self._num_ended[state]

    async def open(self) -> None:
        """Bring the database to the newest schema and listen for changes.

        A SQLite file is this process's alone, so that all claims in it are of processes that are gone:
        the jobs can be claimed at once.

        Raises:
            StoreInUseError: another server has the SQLite file open.
            StoreVersionError: a newer version of the service wrote the database.
            StoreUnusableError: a file, a right, a role or a host is not as it must be.
            ConfigurationError: what stands before the database delivers no notifications.
        """
        await self._database.open()
        try:
            if self._listener is not None:
                await self._listener.start()
            else:
                async with self._database.write() as connection:
                    for removal in queries.remove_all_replicas():
                        await connection.execute(removal)
            await self.follow_clock()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all connections, whether the database answers or not. May be called twice."""
        await self._calls.wait(CLOSE_SECONDS)
        if self._listener is not None:
            await self._listener.stop()
        await self._database.close()

    # --- for callers ------------------------------------------------------------------------------

    @_uninterrupted
    async def add(
        self,
        new_jobs: Sequence[Job],
        limits: QueueLimits,
        attached_call: AttachedCall | None = None,
        refusal: RequestError | None = None,
    ) -> tuple[Job, ...]:
        """Accept all jobs of one owner, or none.

        A job whose request id is held already stands for the one that holds it: that one is returned in
        its place, whatever its state, and the later deadline of the two is its own. Jobs that FAILED or
        were CANCELLED hold their request id no more.

        Args:
            new_jobs: QUEUED, of one owner, with job ids of their own.
            limits: of what waits afterwards, for the same model; jobs that were there do not count as new.
            attached_call: a caller that waits for the job, where there is one; see `detach`.
            refusal: why none of the jobs can be new; they can still stand for those that are there.

        Returns:
            A job for each one given: the same job id tells that it is new.

        Raises:
            RequestIdConflictError: a request id is held by a job that asks for something else.
            QueueFullError, CallerQueueFullError: too many jobs wait.
            RequestError: the refusal, where not all of the jobs are there.
        """
        if not new_jobs:
            return ()
        async with self._database.write() as connection:
            accepted = await accept(self._database, connection, new_jobs, limits, attached_call, refusal)
            pairs = zip(new_jobs, accepted, strict=True)
            changes = [Change(ChangeKind.ADDED, new.job_id) for new, job in pairs if new.job_id == job.job_id]
            await self._tell(connection, changes)
        self._committed(changes)
        return accepted

    @_uninterrupted
    async def probe(self, replica_id: str, is_in_doubt: bool) -> None:
        """Do all that accepting and claiming a job take, and undo it.

        Args:
            replica_id: of this replica.
            is_in_doubt: write a little that lasts, too: what is undone needs no room in a file.
        """
        async with self._database.write() as connection:
            await try_out(connection, replica_id, self._database.is_sqlite)
            await connection.rollback()
        if is_in_doubt:
            async with self._database.write() as connection:
                await connection.execute(queries.beat(replica_id))

    @_uninterrupted
    async def get(self, owner: str | None, job_id: str) -> Job:
        """A job as it is now; of anybody where the owner is None.

        Raises:
            JobNotFoundError: no such job, or it is another's.
            JobInternalError: its row cannot be read, and whoever claims it has not ended it yet.
        """
        async with self._database.read() as connection:
            return _readable(await _row(connection, owner, job_id))

    @_uninterrupted
    async def get_all(self, job_ids: Collection[str]) -> tuple[Job, ...]:
        """Those of the jobs that are there, in any order."""
        found: list[Job] = []
        async with self._database.read() as connection:
            for some in queries.batches(job_ids):
                found.extend(map(job_of, await connection.execute(queries.by_job_ids(some))))
        return tuple(found)

    @_uninterrupted
    async def held_request_ids(self, owner: str, request_ids: Collection[str]) -> frozenset[str]:
        """Those of the request ids that stand for a job of the owner already."""
        held: set[str] = set()
        async with self._database.read() as connection:
            for some in queries.batches(request_ids):
                held.update(
                    row.request_id for row in await connection.execute(queries.by_request_ids(owner, some))
                )
        return frozenset(held)

    @_uninterrupted
    async def list(
        self,
        owner: str | None,
        states: Collection[JobState] = (),
        labels: Mapping[str, str] | None = None,
        page_size: int = 100,
        page_token: str = "",
    ) -> Page:
        """Jobs in one of the states (none: all) that carry all of the labels, newest first.

        A page token stays valid, whatever is added or removed meanwhile.

        Raises:
            InvalidRequestError: the token is none of ours, or of another filter.
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

    @_uninterrupted
    async def request_cancel(self, owner: str | None, job_id: str, reason: CancelReason) -> Job:
        """End a job that nobody has; tell whoever has it to stop. Nothing happens to one that has ended.

        Returns:
            The job as it is then; one that runs has its `cancel_reason` set.

        Raises:
            JobNotFoundError: no such job, or it is another's.
        """
        async with self._database.write() as connection:
            row = await _row(connection, owner, job_id, for_update=True)
            job, changes = await self._cancel(connection, row, reason)
        self._committed(changes, job)
        return job

    @_uninterrupted
    async def detach(self, job_id: str, call: AttachedCall, reason: CancelReason | None) -> Job | None:
        """Note that a caller waits no more; with a reason the job is cancelled if it was the last.

        Returns:
            The job where it was cancelled, as `request_cancel` does.

        Raises:
            JobNotFoundError: no such job.
        """
        async with self._database.write() as connection:
            row = await _row(connection, None, job_id, for_update=True)
            is_last = await claims.detach(connection, row.acceptance_number, call)
            if not is_last or reason is None:
                return None
            job, changes = await self._cancel(connection, row, reason)
        self._committed(changes, job)
        return job

    @_uninterrupted
    async def forget_call(self, call_id: str) -> None:
        """Note that a caller waits no more for whatever it waited for, if it did; nothing is cancelled."""
        async with self._database.write() as connection:
            await connection.execute(queries.detach(call_id))

    @_uninterrupted
    async def delete(self, owner: str | None, job_id: str) -> Job:
        """Remove a job that has ended; its request id is free again.

        Raises:
            JobNotFoundError: no such job, or it is another's.
            JobNotEndedError: it is queued or running.
        """
        change = Change(ChangeKind.DELETED, job_id)
        async with self._database.write() as connection:
            row = await _row(connection, owner, job_id, for_update=True)
            job = job_of(row)
            if row.end_time is None:
                raise JobNotEndedError(job_id)
            await connection.execute(queries.delete_ended([job_id]))
            await connection.execute(queries.delete_idle_turns())
            await self._tell(connection, [change])
        self._committed([change])
        return job

    @_uninterrupted
    async def counts(self, owner: str | None = None) -> Counter[JobState]:
        """Jobs by state that are kept; of one owner only those that have not ended."""
        query = queries.counts() if owner is None else queries.counts_of_owner(owner)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        # Another version of the service may know more states.
        return Counter({JobState(state): count for state, count in rows if state in _STATES})

    @_uninterrupted
    async def queue_orders(
        self, model_fingerprint: str, max_running_jobs_of_caller: int | None = None
    ) -> Mapping[str, tuple[str, ...]]:
        """Ids of the jobs that wait, in the order in which they will be claimed, by their model.

        Args:
            model_fingerprint: of the model that also draws the jobs that any may draw.
            max_running_jobs_of_caller: of each caller; None for any number.
        """
        async with self._database.read() as connection:
            orders = await claims.orders_to_tell(connection, model_fingerprint, max_running_jobs_of_caller)
        return {fingerprint: tuple(job.job_id for job in order) for fingerprint, order in orders.items()}

    # --- for replicas -----------------------------------------------------------------------------

    @_uninterrupted
    async def store_id(self) -> str:
        """Which store this is: the same for all replicas, another one for each database."""
        async with self._database.read() as connection:
            return str((await connection.execute(queries.store_id())).scalar_one())

    @_uninterrupted
    async def join(self, replica_id: str, model: str, before: str | None = None) -> None:
        """Let a replica have jobs and callers, from now until it leaves, or is removed as dead.

        Args:
            replica_id: that no other replica had before.
            model: what others are told of its model.
            before: the id that it had, if it was removed as dead: its callers are still there.
        """
        async with self._database.write() as connection:
            # It may be there already, from a try whose answer was lost.
            await connection.execute(queries.remove_replica(replica_id))
            await connection.execute(queries.add_replica(replica_id, model))
            if before is not None:
                await connection.execute(queries.remove_replica(before))
                await connection.execute(queries.move_calls(before, replica_id))

    @_uninterrupted
    async def beat(self, replica_id: str) -> tuple[ReplicaRecord, ...]:
        """Show that a replica lives.

        Returns:
            All replicas. Where this one is not among them it was removed as dead, with all its claims.
        """
        async with self._database.write() as connection:
            await connection.execute(queries.beat(replica_id))
            rows = (await connection.execute(queries.all_replicas())).all()
        return tuple(ReplicaRecord(*row) for row in rows)

    @_uninterrupted
    async def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All replicas that have not left, nor been removed as dead."""
        async with self._database.read() as connection:
            return tuple(ReplicaRecord(*row) for row in await connection.execute(queries.all_replicas()))

    @_uninterrupted
    async def remove_replica(self, replica_id: str, heartbeat: int | None = None) -> bool:
        """Take a replica its jobs and callers; with a heartbeat only if that is still its newest.

        Returns:
            Whether it was removed.
        """
        change = Change(ChangeKind.ANYTHING)
        async with self._database.write() as connection:
            removal = queries.remove_replica(replica_id, heartbeat)
            if not (await connection.execute(removal)).rowcount:
                return False
            await self._tell(connection, [change])
        self._committed([change])
        return True

    @_uninterrupted
    async def claim(
        self,
        replica_id: str,
        model_fingerprint: str,
        limit: int,
        max_running_jobs_of_caller: int | None = None,
    ) -> tuple[Job, ...]:
        """Take jobs of a model to draw: those that lost their replica, then in the order of `queue_orders`.

        Claims of all replicas are made one after another. A claimed job is as it was left, QUEUED or
        RUNNING, with a claim number of its own. Jobs that are to be cancelled, too late, or unreadable end
        here instead: ask again when fewer come than were asked for.
        """
        for _ in range(MAX_CLAIM_ROUNDS):
            jobs = await self._claim_some(replica_id, model_fingerprint, limit, max_running_jobs_of_caller)
            claimed = tuple(job for job in jobs if not job.state.has_ended)
            if claimed or not jobs:
                return claimed
        return ()

    @_uninterrupted
    async def held(self, replica_id: str) -> tuple[HeldClaim, ...]:
        """The claims that a replica has, by the store."""
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

    @_uninterrupted
    async def abandon(self, replica_id: str, claim: HeldClaim) -> None:
        """Give a job back as it is, of which its replica knows nothing; nothing if it has it no more."""
        change = Change(ChangeKind.CHANGED, claim.job_id, claim_number=claim.claim_number)
        async with self._database.write() as connection:
            query = queries.abandon(replica_id, claim.job_id, claim.claim_number)
            if (await connection.execute(query)).rowcount:
                await self._tell(connection, [change])
        self._committed([change])

    @_uninterrupted
    async def follow_clock(self) -> None:
        """Have the clock follow the database's, where replicas share one."""
        if self._database.is_sqlite:
            return
        async with self._database.read() as connection:
            asked_at = self.clock.elapsed_seconds()
            epoch_seconds = (await connection.execute(queries.database_time())).scalar_one()
            self.clock.follow(epoch_seconds, asked_at)

    @_uninterrupted
    async def save(self, job: Job) -> Saved:
        """Write what the replica that has the job made of it. With a job that has ended the claim ends too.

        A job that somebody wants cancelled ends as CANCELLED alone: any other end is not written then.

        `cancel_reason` and `deadline_time` of a job that has not ended are not written: they are others'.
        To write the same end again, after a StoreUnavailableError, is no error.

        Raises:
            ClaimLostError: another claim has the job, or it was given back, has ended or was deleted.
        """
        change = _changed(job)
        async with self._database.write() as connection:
            saved = await claims.save(connection, job)
            if saved is not Saved.WRITTEN:
                return saved
            await self._tell(connection, [change])
        self._committed([change], job)
        return saved

    @_uninterrupted
    async def release(self, job: Job) -> Job:
        """Give a job back: QUEUED again, with its images and snapshot, or CANCELLED if that was asked for.

        Raises:
            ClaimLostError: as `save`.
        """
        change = _changed(job)
        async with self._database.write() as connection:
            released = await claims.release(connection, job, self.clock.now())
            await self._tell(connection, [change])
        self._committed([change], released)
        return released

    @_uninterrupted
    async def overdue(self, limit: int = 100) -> tuple[str, ...]:
        """Ids of jobs whose deadline has passed: `request_cancel` each with CancelReason.DEADLINE."""
        async with self._database.read() as connection:
            return tuple(
                (await connection.execute(queries.overdue(self.clock.cautious_now(), limit))).scalars()
            )

    # --- for retention ----------------------------------------------------------------------------

    @_uninterrupted
    async def ended(self, after: EndedJob | None = None, limit: int = 100) -> tuple[EndedJob, ...]:
        """Jobs that have ended, the oldest end first; those behind one of them where it is given."""
        behind = None if after is None else (after.end_time, after.acceptance_number)
        async with self._database.read() as connection:
            rows = await connection.execute(queries.ended(behind, limit))
            return tuple(EndedJob(*row) for row in rows)

    @_uninterrupted
    async def delete_ended(self, job_ids: Collection[str]) -> None:
        """Remove those of the jobs that are there and have ended, of anybody."""
        changes: list[Change] = []
        async with self._database.write() as connection:
            for some in queries.batches(job_ids):
                deleted = (await connection.execute(queries.delete_ended(some))).scalars()
                changes += [Change(ChangeKind.DELETED, job_id) for job_id in deleted]
            await connection.execute(queries.delete_idle_turns())
            await self._tell(connection, changes)
        self._committed(changes)

    @_uninterrupted
    async def usage(self) -> Usage:
        """How much is kept of jobs that have ended."""
        async with self._database.read() as connection:
            num_ended_jobs, image_bytes = (await connection.execute(queries.usage())).one()
        return Usage(num_ended_jobs, int(image_bytes))

    # --- changes ----------------------------------------------------------------------------------

    def subscribe(self) -> AbstractContextManager[Subscription]:
        """`with store.subscribe() as changes: async for change in changes`: all that commits from now on.

        Read what is there after subscribing, and nothing is missed.
        """
        return self._hub.subscribe()

    @_uninterrupted
    async def publish(self, job_id: str, payload: bytes) -> None:
        """Tell all subscribers, of all replicas, something that is kept nowhere.

        Args:
            job_id: what it is about.
            payload: at most `changes.MAX_PAYLOAD_BYTES`.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"payload: must be at most {MAX_PAYLOAD_BYTES} bytes, is {len(payload)}")
        change = Change(ChangeKind.PUBLISHED, job_id, payload)
        if not self._database.is_sqlite:
            async with self._database.write() as connection:
                await self._tell(connection, [change])
        self._committed([change])

    # --- the rest ---------------------------------------------------------------------------------

    async def _claim_some(
        self, replica_id: str, model_fingerprint: str, limit: int, max_running_jobs_of_caller: int | None
    ) -> tuple[Job, ...]:
        async with self._database.write() as connection:
            await self._database.lock(connection, Lock.CLAIM)
            order = await claims.order_to_claim(
                connection, model_fingerprint, max_running_jobs_of_caller, limit
            )
            jobs = await claims.claim_first(
                connection, replica_id, order, self.clock.cautious_now(), self._database.is_sqlite, limit
            )
            changes = [_changed(job) for job in jobs]
            await self._tell(connection, changes)
        for job, change in zip(jobs, changes, strict=True):
            self._committed([change], job)
        return jobs

    async def _cancel(
        self, connection: AsyncConnection, row: Row[Any], reason: CancelReason
    ) -> tuple[Job, Sequence[Change]]:
        """End a job whose row is locked, or have its replica end it."""
        job = _readable(row)
        if job.state.has_ended:
            return job, ()
        if row.is_unclaimed:
            job = job.cancelled_unclaimed(job.cancel_reason or reason, self.clock.now())
            await connection.execute(queries.write_ended_unclaimed(row.acceptance_number, job))
            change = _changed(job)
        else:
            job = replace(job, cancel_reason=job.cancel_reason or reason)
            await connection.execute(queries.ask_to_cancel(row.acceptance_number, reason.value))
            change = Change(ChangeKind.CANCEL_REQUESTED, job.job_id)
        await self._tell(connection, [change])
        return job, (change,)

    async def _tell(self, connection: AsyncConnection, changes: Sequence[Change]) -> None:
        """PostgreSQL tells everybody, this process included, when the transaction commits."""
        if changes and not self._database.is_sqlite:
            await connection.execute(queries.notify(CHANNEL, [to_text(change) for change in changes]))

    def _committed(self, changes: Sequence[Change], job: Job | None = None) -> None:
        """With SQLite nobody else is there to be told."""
        if changes and job is not None and job.state.has_ended:
            self._num_ended[job.state] += 1
        if self._database.is_sqlite:
            self._hub.tell(changes)


def _reason_of(text: str) -> CancelReason:
    """Why a job is to be cancelled; what only another version of the service knows is a request."""
    try:
        return CancelReason(text)
    except ValueError:
        return CancelReason.REQUESTED


def _changed(job: Job) -> Change:
    return Change(ChangeKind.CHANGED, job.job_id, claim_number=job.claim_number)


def _readable(row: Row[Any]) -> Job:
    """The job of a row that was not found unreadable; raises JobInternalError for one that just was."""
    job = job_of(row)
    if job.is_unreadable and row.end_time is None and job.error is not None:
        raise job.error
    return job


async def _row(
    connection: AsyncConnection, owner: str | None, job_id: str, for_update: bool = False
) -> Row[Any]:
    query = queries.by_job_id(owner, job_id, for_update)
    row: Row[Any] | None = (await connection.execute(query)).one_or_none()
    if row is None:
        raise JobNotFoundError(job_id)
    return row
