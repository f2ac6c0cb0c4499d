"""Every statement of the job store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.dml import ReturningInsert

from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store.database import now
from hidream_grpc.jobs.store.rows import changed_columns, label_digest
from hidream_grpc.jobs.store.schema import job_labels, jobs, turns

_has_not_ended = jobs.c.end_time.is_(None)
_is_unclaimed = sa.and_(
    _has_not_ended, sa.or_(jobs.c.lease_end_time.is_(None), jobs.c.lease_end_time <= now())
)
_is_waiting = sa.and_(_is_unclaimed, jobs.c.state == JobState.QUEUED)
_MAX_VALUES = 1000


def batches(values: Collection[str]) -> Iterator[list[str]]:
    """So many values as one statement may hold on every database."""
    ordered = list(values)
    return (ordered[start : start + _MAX_VALUES] for start in range(0, len(ordered), _MAX_VALUES))


def by_job_id(owner: str | None, job_id: str, for_update: bool = False) -> sa.Select[Any]:
    """A job of an owner; of anybody where the owner is None."""
    query = sa.select(jobs, _is_unclaimed.label("is_unclaimed")).where(jobs.c.job_id == job_id)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    return query.with_for_update() if for_update else query


def by_job_ids(job_ids: Collection[str]) -> sa.Select[Any]:
    """Jobs of anybody."""
    return sa.select(jobs).where(jobs.c.job_id.in_(job_ids))


def by_request_ids(owner: str, request_ids: Collection[str]) -> sa.Select[Any]:
    """The jobs that hold one of the request ids."""
    return sa.select(jobs).where(
        jobs.c.owner == owner,
        jobs.c.request_id.in_(request_ids),
        jobs.c.state.not_in((JobState.FAILED, JobState.CANCELLED)),
    )


def page(
    owner: str | None,
    states: Collection[JobState],
    labels: Mapping[str, str],
    before_number: int | None,
    limit: int,
) -> sa.Select[Any]:
    """Jobs that match, newest first, from before a number on."""
    query = sa.select(jobs).order_by(jobs.c.number.desc()).limit(limit)
    if owner is not None:
        query = query.where(jobs.c.owner == owner)
    if states:
        query = query.where(jobs.c.state.in_(states))
    for key, value in labels.items():
        carriers = sa.select(job_labels.c.job_number).where(
            job_labels.c.label_digest == label_digest(key, value)
        )
        query = query.where(jobs.c.number.in_(carriers))
    if before_number is not None:
        query = query.where(jobs.c.number < before_number)
    return query


def add_jobs() -> ReturningInsert[int]:
    """Insert rows; their numbers come back in the same order, and grow in it."""
    return sa.insert(jobs).returning(jobs.c.number, sort_by_parameter_order=True)


def add_labels() -> sa.Insert:
    """Insert rows of `label_rows`."""
    return sa.insert(job_labels)


def label_rows(job_number: int, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of `job_labels` of a job."""
    digests = {label_digest(key, value) for key, value in labels.items()}
    return [{"label_digest": digest, "job_number": job_number} for digest in sorted(digests)]


def num_waiting(caller: str | None = None) -> sa.Select[int]:
    """Jobs that nobody has and that were not begun, of all callers or of one."""
    query = sa.select(sa.func.count()).select_from(jobs).where(_is_waiting)
    return query if caller is None else query.where(jobs.c.caller == caller)


def counts() -> sa.Select[str, int]:
    """Jobs by state."""
    return sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)


def counts_of_owner(owner: str) -> sa.Select[str, int]:
    """An owner's jobs that have not ended, by state."""
    return counts().where(jobs.c.owner == owner, _has_not_ended)


def waiting() -> sa.Select[Any]:
    """All jobs that wait."""
    return sa.select(jobs.c.number, jobs.c.job_id, jobs.c.caller, jobs.c.priority).where(_is_waiting)


def last_turns() -> sa.Select[str, int]:
    """When each caller last had a turn."""
    return sa.select(turns.c.caller, turns.c.last_turn)


def next_job(max_running_jobs_of_caller: int | None) -> sa.Select[Any]:
    """The job that is claimed next, locked; one that another replica just claims is passed over.

    Jobs that were begun and lost their replica go first: they have had their turn.
    """
    query = (
        sa.select(jobs, (jobs.c.deadline_time <= now()).label("is_late"))
        .outerjoin(turns, turns.c.caller == jobs.c.caller)
        .where(_is_unclaimed)
        .order_by(
            sa.case((jobs.c.state == JobState.RUNNING, 0), else_=1),
            jobs.c.priority.desc(),
            sa.func.coalesce(turns.c.last_turn, 0),
            jobs.c.number,
        )
        .limit(1)
        .with_for_update(of=jobs, skip_locked=True)
    )
    if max_running_jobs_of_caller is not None:
        others = jobs.alias()
        num_running = (
            sa.select(sa.func.count())
            .select_from(others)
            .where(
                others.c.caller == jobs.c.caller, others.c.end_time.is_(None), others.c.lease_end_time > now()
            )
            .scalar_subquery()
        )
        query = query.where(num_running < max_running_jobs_of_caller)
    return query


def claim(number: int, replica_id: str, lease_seconds: float) -> sa.Update:
    """Give a job to a replica."""
    return (
        sa.update(jobs)
        .where(jobs.c.number == number)
        .values(
            claim_number=jobs.c.claim_number + 1,
            replica_id=replica_id,
            lease_end_time=now() + lease_seconds,
        )
    )


def take_turn(caller: str, is_sqlite: bool) -> Any:
    """Put a caller behind all others."""
    newest = turns.alias()
    turn = sa.select(sa.func.coalesce(sa.func.max(newest.c.last_turn), 0) + 1).scalar_subquery()
    insert = sqlite_insert if is_sqlite else postgresql_insert
    return (
        insert(turns)
        .values(caller=caller, last_turn=turn)
        .on_conflict_do_update(index_elements=["caller"], set_={"last_turn": turn})
    )


def renew(replica_id: str, job_ids: Collection[str], lease_seconds: float) -> sa.Update:
    """Prolong the leases of those of the jobs that the replica has."""
    return (
        sa.update(jobs)
        .where(jobs.c.replica_id == replica_id, jobs.c.job_id.in_(job_ids), _has_not_ended)
        .values(lease_end_time=now() + lease_seconds)
    )


def held(replica_id: str, job_ids: Collection[str]) -> sa.Select[Any]:
    """Those of the jobs that the replica has."""
    return sa.select(jobs.c.job_id, jobs.c.claim_number, jobs.c.cancel_reason, jobs.c.deadline_time).where(
        jobs.c.replica_id == replica_id, jobs.c.job_id.in_(job_ids), _has_not_ended
    )


def forget_claims() -> sa.Update:
    """Make all jobs claimable: whoever had them is gone."""
    return sa.update(jobs).where(_has_not_ended).values(replica_id=None, lease_end_time=None)


def write_claimed(job: Job) -> sa.Update:
    """Write a job that has not ended, if its claim is still the newest and nobody has ended it."""
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
    """As `write_claimed`, for a job that ends: nobody has it any more."""
    return write_claimed(job).values(**_no_claim(job))


def write_ended_unclaimed(number: int, job: Job) -> sa.Update:
    """End a job that nobody has, and whose row is locked."""
    return (
        sa.update(jobs)
        .where(jobs.c.number == number)
        .values(**changed_columns(job), **_no_claim(job), claim_number=job.claim_number)
    )


def write_released(number: int, job: Job) -> sa.Update:
    """Give back a job whose row is locked."""
    return (
        sa.update(jobs)
        .where(jobs.c.number == number)
        .values(**changed_columns(job), replica_id=None, lease_end_time=None)
    )


def ask_to_cancel(number: int, reason: str) -> sa.Update:
    """Note who or what wants a running job stopped; the first to ask stays."""
    return (
        sa.update(jobs)
        .where(jobs.c.number == number)
        .values(cancel_reason=sa.func.coalesce(jobs.c.cancel_reason, reason))
    )


def set_deadline(job_id: str, deadline_time: float | None) -> sa.Update:
    """Change when a job stops."""
    return sa.update(jobs).where(jobs.c.job_id == job_id).values(deadline_time=deadline_time)


def overdue(limit: int) -> sa.Select[str]:
    """Jobs whose deadline has passed, and that do not yet know."""
    return (
        sa.select(jobs.c.job_id)
        .where(_has_not_ended, jobs.c.deadline_time <= now(), jobs.c.cancel_reason.is_(None))
        .limit(limit)
    )


def delete(number: int) -> sa.Delete:
    """Remove a row, and its labels with it."""
    return sa.delete(jobs).where(jobs.c.number == number)


def delete_idle_turn(caller: str) -> sa.Delete:
    """Forget the turn of a caller without any job."""
    has_jobs = sa.exists().where(jobs.c.caller == caller)
    return sa.delete(turns).where(turns.c.caller == caller, ~has_jobs)


def ended(before_time: float | None, limit: int) -> sa.Select[Any]:
    """Jobs that have ended, those that ended first first."""
    query = (
        sa.select(jobs.c.job_id, jobs.c.owner, jobs.c.end_time, jobs.c.image_bytes)
        .where(jobs.c.end_time.is_not(None))
        .order_by(jobs.c.end_time, jobs.c.number)
        .limit(limit)
    )
    return query if before_time is None else query.where(jobs.c.end_time < before_time)


def usage() -> sa.Select[Any]:
    """How much is kept of jobs that have ended."""
    return sa.select(
        sa.func.count().label("num_ended_jobs"),
        sa.func.coalesce(sa.func.sum(jobs.c.image_bytes), 0).label("image_bytes"),
    ).where(jobs.c.end_time.is_not(None))


def notify(channel: str, texts: Sequence[str]) -> sa.Select[Any]:
    """Tell all who listen on PostgreSQL, when the transaction commits."""
    return sa.select(sa.func.pg_notify(channel, sa.func.unnest(sa.cast(list(texts), ARRAY(sa.Text)))))


def _no_claim(job: Job) -> dict[str, Any]:
    return {
        "replica_id": None,
        "lease_end_time": None,
        "cancel_reason": None if job.cancel_reason is None else job.cancel_reason.value,
    }
