"""Every statement of the job store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.dml import ReturningDelete, ReturningInsert

from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store.rows import changed_columns, label_digest, submission_column
from hidream_grpc.jobs.store.schema import (
    HOLDS_ITS_REQUEST_ID,
    WAS_TAKEN,
    attached_calls,
    identity,
    job_labels,
    jobs,
    replicas,
    turns,
)

_has_not_ended = jobs.c.end_time.is_(None)
_is_held = sa.exists().where(replicas.c.replica_id == jobs.c.replica_id)
_is_unclaimed = sa.and_(_has_not_ended, ~_is_held)
_is_waiting = sa.and_(_is_unclaimed, jobs.c.state == JobState.QUEUED)
_MAX_VALUES = 1000
_MAX_NUMBER = 2**63 - 1


def batches(values: Collection[str]) -> Iterator[list[str]]:
    """Lists of as many values as one statement may hold on every database."""
    ordered = list(values)
    return (ordered[start : start + _MAX_VALUES] for start in range(0, len(ordered), _MAX_VALUES))


def by_job_id(owner: str | None, job_id: str, for_update: bool = False) -> sa.Select[Any]:
    """Select a job of an owner; of any owner where it is None."""
    query = sa.select(jobs, _is_unclaimed.label("is_unclaimed")).where(jobs.c.job_id == job_id)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    return query.with_for_update() if for_update else query


def by_job_ids(job_ids: Collection[str]) -> sa.Select[Any]:
    """Select jobs of all owners."""
    return sa.select(jobs).where(jobs.c.job_id.in_(job_ids))


def by_request_ids(owner: str, request_ids: Collection[str]) -> sa.Select[Any]:
    """Select the jobs that hold one of the request ids."""
    return sa.select(jobs).where(
        jobs.c.owner == owner,
        jobs.c.request_id.in_(request_ids),
        HOLDS_ITS_REQUEST_ID,
    )


def page(
    owner: str | None,
    states: Collection[JobState],
    labels: Mapping[str, str],
    before: int | None,
    limit: int,
) -> sa.Select[Any]:
    """Select jobs that match, newest first, whose acceptance numbers are below the given one."""
    query = sa.select(jobs).order_by(jobs.c.acceptance_number.desc()).limit(limit)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if states:
        query = query.where(jobs.c.state.in_(states))
    if states and not any(state.has_ended for state in states):
        # These are few: those that have ended are not looked at.
        others = jobs.alias()
        going_on = sa.select(others.c.acceptance_number).where(others.c.end_time.is_(None))
        query = query.where(jobs.c.acceptance_number.in_(going_on.where(others.c.state.in_(states))))
    for key, value in labels.items():
        carriers = sa.select(job_labels.c.job_number).where(
            job_labels.c.label_digest == label_digest(key, value)
        )
        query = query.where(jobs.c.acceptance_number.in_(carriers))
    if before is not None:
        query = query.where(jobs.c.acceptance_number < before)
    return query


def add_jobs() -> ReturningInsert[int]:
    """Insert rows; return their acceptance numbers in the same order, growing."""
    return sa.insert(jobs).returning(jobs.c.acceptance_number, sort_by_parameter_order=True)


def add_labels() -> sa.Insert:
    """Insert rows of `label_rows`."""
    return sa.insert(job_labels)


def label_rows(job_number: int, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of `job_labels` of a job."""
    digests = {label_digest(key, value) for key, value in labels.items()}
    return [{"label_digest": digest, "job_number": job_number} for digest in sorted(digests)]


def num_waiting(model_fingerprint: str, caller: str | None = None) -> sa.Select[int]:
    """Count the jobs of a model that no replica has and that were not begun, of all callers or of one."""
    is_counted = sa.and_(_is_waiting, _is_of_model(model_fingerprint))
    query = sa.select(sa.func.count()).select_from(jobs).where(is_counted)
    return query if caller is None else query.where(jobs.c.caller == caller)


def counts() -> sa.Select[str, int]:
    """Count the jobs that have not ended by state, without a look at those that have."""
    return sa.select(jobs.c.state, sa.func.count()).where(_has_not_ended).group_by(jobs.c.state)


def waiting_among(job_ids: Collection[str]) -> sa.Select[Any]:
    """Select those of the jobs that wait and were not begun."""
    return _waiting().where(jobs.c.job_id.in_(job_ids))


def waiting_after(acceptance_number: int, limit: int) -> sa.Select[Any]:
    """Select jobs that wait and were not begun, accepted after a number, in the order of acceptance."""
    is_later = jobs.c.acceptance_number > acceptance_number
    return _waiting().where(is_later).order_by(jobs.c.acceptance_number).limit(limit)


def first_to_claim(model_fingerprint: str, max_jobs: int) -> sa.CompoundSelect[Any]:
    """Select the unclaimed jobs that were begun, and the oldest others of each caller in each priority.

    To claim so many jobs no others are needed for the order, however many wait. Columns of `WaitingJob`.
    """
    is_of_model = _is_of_model(model_fingerprint)
    lines = sa.select(jobs.c.priority, jobs.c.caller).where(_is_waiting, is_of_model).distinct().subquery()
    last_number = (
        sa.select(jobs.c.acceptance_number)
        .where(jobs.c.priority == lines.c.priority, jobs.c.caller == lines.c.caller)
        .where(_is_waiting, is_of_model)
        .order_by(jobs.c.acceptance_number)
        .offset(max_jobs - 1)
        .limit(1)
        .scalar_subquery()
    )
    ends = sa.select(lines, sa.func.coalesce(last_number, _MAX_NUMBER).label("last_number")).cte()
    # Without statistics, as after a burst of jobs, PostgreSQL would look for the end of a line at each row.
    ends = ends.prefix_with("MATERIALIZED", dialect="postgresql")
    is_of_line = sa.and_(jobs.c.priority == ends.c.priority, jobs.c.caller == ends.c.caller)
    oldest = sa.select(*_waiting_columns()).join(ends, is_of_line).where(_is_waiting, is_of_model)
    begun = sa.select(*_waiting_columns()).where(_is_unclaimed, is_of_model, _was_begun())
    return sa.union_all(begun, oldest.where(jobs.c.acceptance_number <= ends.c.last_number))


def newest_start(model_fingerprint: str) -> sa.Select[int]:
    """Select the acceptance number of the newest job of a model that any replica has taken."""
    newest = sa.func.max(jobs.c.acceptance_number)
    return sa.select(newest).where(WAS_TAKEN, _is_of_model(model_fingerprint))


def last_turns() -> sa.Select[str, int]:
    """Select when each caller last had a turn."""
    return sa.select(turns.c.caller, turns.c.last_turn)


def num_running_by_caller() -> sa.Select[str, int]:
    """Count the jobs of each caller that replicas have now."""
    num_running = sa.func.count().label("num_running")
    return sa.select(jobs.c.caller, num_running).where(_has_not_ended, _is_held).group_by(jobs.c.caller)


def to_claim(numbers: Collection[int]) -> sa.Select[Any]:
    """Select and lock those of the jobs that no replica has, but for those that are being cancelled."""
    return (
        sa.select(jobs)
        .where(jobs.c.acceptance_number.in_(numbers), _is_unclaimed)
        .with_for_update(of=jobs, skip_locked=True)
    )


def claim(acceptance_number: int, replica_id: str) -> sa.Update:
    """Give a job to a replica."""
    return (
        sa.update(jobs)
        .where(jobs.c.acceptance_number == acceptance_number)
        .values(claim_number=jobs.c.claim_number + 1, replica_id=replica_id)
    )


def take_turn(caller: str, is_sqlite: bool) -> Any:
    """Give a caller the newest turn: it is behind all others now."""
    newest = turns.alias()
    turn = sa.select(sa.func.coalesce(sa.func.max(newest.c.last_turn), 0) + 1).scalar_subquery()
    insert = sqlite_insert if is_sqlite else postgresql_insert
    return (
        insert(turns)
        .values(caller=caller, last_turn=turn)
        .on_conflict_do_update(index_elements=["caller"], set_={"last_turn": turn})
    )


def held(replica_id: str) -> sa.Select[Any]:
    """Select the claims that a replica has: columns of `HeldClaim`."""
    return sa.select(jobs.c.job_id, jobs.c.claim_number, jobs.c.cancel_reason).where(
        jobs.c.replica_id == replica_id, _has_not_ended
    )


def abandon(replica_id: str, job_id: str, claim_number: int) -> sa.Update:
    """Give back, as it is, a job that its replica does not run."""
    return (
        sa.update(jobs)
        .where(
            jobs.c.job_id == job_id,
            jobs.c.replica_id == replica_id,
            jobs.c.claim_number == claim_number,
            _has_not_ended,
        )
        .values(replica_id=None)
    )


def add_replica(replica_id: str, model: str) -> sa.Insert:
    """Register a replica: from now on it may have jobs and callers."""
    return sa.insert(replicas).values(replica_id=replica_id, heartbeat=0, model=model)


def beat(replica_id: str) -> sa.Update:
    """Raise a replica's heartbeat."""
    return (
        sa.update(replicas)
        .where(replicas.c.replica_id == replica_id)
        .values(heartbeat=replicas.c.heartbeat + 1)
    )


def all_replicas() -> sa.Select[Any]:
    """Select every replica that has not been removed: columns of `ReplicaRecord`."""
    return sa.select(replicas.c.replica_id, replicas.c.heartbeat, replicas.c.model)


def remove_replica(replica_id: str, heartbeat: int | None = None) -> sa.Delete:
    """Remove a replica, and with it its claims; with a heartbeat only if that is still its newest."""
    removal = sa.delete(replicas).where(replicas.c.replica_id == replica_id)
    return removal if heartbeat is None else removal.where(replicas.c.heartbeat == heartbeat)


def remove_all_replicas() -> tuple[sa.Delete, sa.Delete]:
    """Remove every replica and all attached calls: their processes are gone."""
    return sa.delete(replicas), sa.delete(attached_calls)


def database_time() -> sa.Select[float]:
    """Select seconds since the epoch by PostgreSQL's clock, which all replicas share."""
    return sa.select(sa.cast(sa.extract("epoch", sa.func.clock_timestamp()), sa.Double))


def store_id() -> sa.Select[str]:
    """Select the id of this store."""
    return sa.select(identity.c.store_id)


def attach(call_id: str, job_id: str, replica_id: str) -> sa.Insert:
    """Note that a caller waits for a job at a replica."""
    job_number = sa.select(jobs.c.acceptance_number).where(jobs.c.job_id == job_id).scalar_subquery()
    return sa.insert(attached_calls).values(call_id=call_id, job_number=job_number, replica_id=replica_id)


def detach(call_id: str) -> sa.Delete:
    """Note that a caller waits no more."""
    return sa.delete(attached_calls).where(attached_calls.c.call_id == call_id)


def move_calls(from_replica_id: str, to_replica_id: str) -> sa.Update:
    """Note that a replica goes on under another id."""
    return (
        sa.update(attached_calls)
        .where(attached_calls.c.replica_id == from_replica_id)
        .values(replica_id=to_replica_id)
    )


def num_attached(acceptance_number: int) -> sa.Select[int]:
    """Count the callers that wait for a job, at replicas that live."""
    return (
        sa.select(sa.func.count())
        .select_from(attached_calls.join(replicas, attached_calls.c.replica_id == replicas.c.replica_id))
        .where(attached_calls.c.job_number == acceptance_number)
    )


def write_claimed(job: Job) -> sa.Update:
    """Write a job that has not ended, if its claim is still the newest and it was not ended elsewhere."""
    return (
        sa.update(jobs)
        .where(
            jobs.c.job_id == job.job_id,
            jobs.c.claim_number == job.claim_number,
            jobs.c.replica_id.is_not(None),
            _has_not_ended,
        )
        .values(**changed_columns(job))
    )


def write_ended_claimed(job: Job) -> sa.Update:
    """Write a job that ends, as `write_claimed` does: no replica has it any more.

    A job that is to be cancelled is not written with another end. The row is written whole, which undoes
    what another program has changed in it.
    """
    update = write_claimed(job).values(**_no_claim(job), **submission_column(job))
    return update if job.state is JobState.CANCELLED else update.where(jobs.c.cancel_reason.is_(None))


def write_ended_unclaimed(acceptance_number: int, job: Job) -> sa.Update:
    """End a job that no replica has, and whose row is locked."""
    return (
        sa.update(jobs)
        .where(jobs.c.acceptance_number == acceptance_number)
        .values(**changed_columns(job), **_no_claim(job), claim_number=job.claim_number)
    )


def write_released(acceptance_number: int, job: Job) -> sa.Update:
    """Give back a job whose row is locked."""
    return (
        sa.update(jobs)
        .where(jobs.c.acceptance_number == acceptance_number)
        .values(**changed_columns(job), replica_id=None)
    )


def ask_to_cancel(acceptance_number: int, reason: str) -> sa.Update:
    """Note why a running job is to stop; the first reason stays."""
    return (
        sa.update(jobs)
        .where(jobs.c.acceptance_number == acceptance_number)
        .values(cancel_reason=sa.func.coalesce(jobs.c.cancel_reason, reason))
    )


def put_deadline_off(job_id: str, deadline_time: float | None) -> sa.Update:
    """Put off a job's deadline, or remove it; nothing changes where it is later already."""
    update = sa.update(jobs).where(jobs.c.job_id == job_id).values(deadline_time=deadline_time)
    return update if deadline_time is None else update.where(jobs.c.deadline_time < deadline_time)


def overdue(now: float, limit: int) -> sa.Select[str]:
    """Select jobs whose deadline has passed and that are not being cancelled yet."""
    return (
        sa.select(jobs.c.job_id)
        .where(_has_not_ended, jobs.c.deadline_time <= now, jobs.c.cancel_reason.is_(None))
        .limit(limit)
    )


def delete_ended(job_ids: Collection[str]) -> ReturningDelete[str]:
    """Remove those of the jobs that have ended, and their labels with them; return their ids."""
    is_to_go = sa.and_(jobs.c.job_id.in_(job_ids), ~_has_not_ended)
    return sa.delete(jobs).where(is_to_go).returning(jobs.c.job_id)


def delete_idle_turns() -> sa.Delete:
    """Forget the turns of callers without any job, but for the newest: turns are counted on from it."""
    newest = turns.alias()
    newest_turn = sa.select(sa.func.max(newest.c.last_turn)).scalar_subquery()
    return sa.delete(turns).where(
        ~sa.exists().where(jobs.c.caller == turns.c.caller), turns.c.last_turn < newest_turn
    )


def ended(after: tuple[float, int] | None, limit: int) -> sa.Select[Any]:
    """Select jobs that have ended, in the order of their ends, behind an end time and acceptance number.

    The columns are those of `EndedJob`.
    """
    query = (
        sa.select(jobs.c.job_id, jobs.c.acceptance_number, jobs.c.end_time, jobs.c.image_bytes)
        .where(~_has_not_ended)
        .order_by(jobs.c.end_time, jobs.c.acceptance_number)
        .limit(limit)
    )
    if after is None:
        return query
    return query.where(sa.tuple_(jobs.c.end_time, jobs.c.acceptance_number) > sa.tuple_(*after))


def usage() -> sa.Select[Any]:
    """Sum up how much is kept of jobs that have ended."""
    return sa.select(
        sa.func.count().label("num_ended_jobs"),
        sa.func.coalesce(sa.func.sum(jobs.c.image_bytes), 0).label("image_bytes"),
    ).where(jobs.c.end_time.is_not(None))


def notify(channel: str, texts: Sequence[str]) -> sa.Select[Any]:
    """Notify all that listen on PostgreSQL, when the transaction commits."""
    return sa.select(sa.func.pg_notify(channel, sa.func.unnest(sa.cast(list(texts), ARRAY(sa.Text)))))


def write(acceptance_number: int, columns: Mapping[str, Any]) -> sa.Update:
    """Write columns of a job whose row is locked."""
    return sa.update(jobs).where(jobs.c.acceptance_number == acceptance_number).values(**columns)


def _waiting() -> sa.Select[Any]:
    """Select jobs that no replica has and that were not begun."""
    return sa.select(jobs).where(_is_waiting)


def _waiting_columns() -> tuple[sa.ColumnElement[Any], ...]:
    return (jobs.c.acceptance_number, jobs.c.job_id, jobs.c.caller, jobs.c.priority, _was_begun())


def _was_begun() -> sa.ColumnElement[bool]:
    return (jobs.c.state != JobState.QUEUED).label("was_begun")


def _is_of_model(fingerprint: str) -> sa.ColumnElement[bool]:
    return jobs.c.model_fingerprint.in_((fingerprint, ""))


def _no_claim(job: Job) -> dict[str, Any]:
    return {
        "replica_id": None,
        "cancel_reason": None if job.cancel_reason is None else job.cancel_reason.value,
    }
