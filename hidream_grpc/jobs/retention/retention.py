"""Removes jobs that have ended, with their images: those that are too old, too many or too large."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hidream_grpc.background import Outage
from hidream_grpc.errors import ArtifactUnavailableError, JobNotEndedError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.store.records import EndedJob, Usage
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

MAX_JOBS_READ = 1000
"""How many jobs are read together; a sweep goes on until all that is to go is removed."""
JOBS_OF_A_BATCH = 500
"""How many jobs are removed together: their files at the same time, their rows in one transaction."""


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """What is kept of jobs that have ended.

    Attributes:
        retention_seconds: how long each is kept after its end, at most.
        max_retained_jobs: how many; None for any number.
        max_retained_bytes: bytes of the images of all of them; None for any number.
        is_dry_run: log which jobs would go, and keep them.
    """

    retention_seconds: float
    max_retained_jobs: int | None = None
    max_retained_bytes: int | None = None
    is_dry_run: bool = False


class RemovalReason(StrEnum):
    """Why a job is removed."""

    AGE = "age"
    NUMBER = "number"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Removal:
    """A job that is to be removed."""

    job: EndedJob
    reason: RemovalReason


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """The jobs that a sweep left and those that it removed; a dry run removes none."""

    num_retained_jobs: int
    retained_bytes: int
    num_removed: Mapping[RemovalReason, int]


def choose_removals(
    oldest: Sequence[EndedJob], usage: Usage, limits: RetentionLimits, now: float
) -> tuple[Removal, ...]:
    """Choose the jobs to remove, oldest first: those that are too old, then more while too much is left.

    Args:
        oldest: the jobs that ended first, in this order; there may be more.
        usage: how much is kept of all jobs that have ended.
        limits: how much may be kept.
        now: seconds since the epoch.
    """
    num_jobs, image_bytes = usage.num_ended_jobs, usage.image_bytes
    removals = []
    for job in oldest:
        if now - job.end_time > limits.retention_seconds:
            reason = RemovalReason.AGE
        elif limits.max_retained_jobs is not None and num_jobs > limits.max_retained_jobs:
            reason = RemovalReason.NUMBER
        elif limits.max_retained_bytes is not None and image_bytes > limits.max_retained_bytes:
            reason = RemovalReason.BYTES
        else:
            break
        removals.append(Removal(job, reason))
        num_jobs -= 1
        image_bytes -= job.image_bytes
    return tuple(removals)


async def remove_job(store: SqlJobStore, artifacts: ArtifactStore, owner: str | None, job_id: str) -> None:
    """Remove a job: its files, then its row, so that a kill between the two leaves nothing behind for ever.

    Raises:
        JobNotFoundError: there is no such job, or it is another owner's.
        JobNotEndedError: it is queued or running.
    """
    job = await store.get(owner, job_id)
    if not job.state.has_ended:
        raise JobNotEndedError(job_id)
    await artifacts.remove(job_id)
    await store.delete(owner, job_id)


class Retention:
    """Applies the limits to the jobs in the store, at each sweep."""

    def __init__(
        self,
        limits: RetentionLimits,
        store: SqlJobStore,
        artifacts: ArtifactStore,
        is_read: Callable[[str], bool],
        observe: Callable[[RetentionReport], None],
    ) -> None:
        """Take what says whether a job is read here, and what is called after every sweep."""
        self._limits = limits
        self._store = store
        self._artifacts = artifacts
        self._is_read = is_read
        self._observe = observe
        self._logged: frozenset[str] = frozenset()
        self._outage = Outage(logger, "remove the images of old jobs")

    async def sweep(self, now: float) -> RetentionReport:
        """Remove jobs beyond the limits, oldest first; in a dry run log once of each that it would go.

        A job that is read here, or whose images cannot be removed, stays until the next sweep, and
        holds up no other.

        Args:
            now: seconds since the epoch by the store's clock.

        Raises:
            StoreUnavailableError: what was removed before is reported, the rest is left to the next sweep.
        """
        num_removed: Counter[RemovalReason] = Counter()
        usage = left = await self._store.usage()
        would_go: list[Removal] = []
        try:
            last: EndedJob | None = None
            while oldest := await self._store.ended(last, MAX_JOBS_READ):
                last = oldest[-1]
                removals = choose_removals(oldest, left, self._limits, now)
                if self._limits.is_dry_run:
                    would_go += removals
                    removed: Sequence[Removal] = removals
                else:
                    removed = await self._remove(removals)
                    num_removed.update(removal.reason for removal in removed)
                left = _without(left, removed)
                if len(removals) < len(oldest):
                    break
        finally:
            kept = usage if self._limits.is_dry_run else left
            report = RetentionReport(kept.num_ended_jobs, kept.image_bytes, dict(num_removed))
            self._observe(report)
            if num_removed:
                facts = {reason.value: count for reason, count in num_removed.items()}
                logger.info("removed %d old jobs", num_removed.total(), extra=facts)
        self._log_removals(would_go)
        return report

    async def _remove(self, removals: Sequence[Removal]) -> list[Removal]:
        """Remove jobs with their images; return those that are gone."""
        removed: list[Removal] = []
        unread = [removal for removal in removals if not self._is_read(removal.job.job_id)]
        for start in range(0, len(unread), JOBS_OF_A_BATCH):
            batch = unread[start : start + JOBS_OF_A_BATCH]
            have_no_files = await asyncio.gather(*(self._remove_files(removal.job) for removal in batch))
            gone = [removal for removal, is_gone in zip(batch, have_no_files, strict=True) if is_gone]
            await self._store.delete_ended([removal.job.job_id for removal in gone])
            removed += gone
        return removed

    async def _remove_files(self, job: EndedJob) -> bool:
        """Remove the images of a job; return whether there are none now.

        The files go before the row, as in `remove_job`.
        """
        if job.image_bytes == 0:
            return True
        try:
            await self._artifacts.remove(job.job_id)
        except ArtifactUnavailableError as error:
            self._outage.note_failure(error)
            return False
        self._outage.note_success()
        return True

    def _log_removals(self, removals: Sequence[Removal]) -> None:
        for removal in removals:
            job = removal.job
            if job.job_id not in self._logged:
                facts = {"job_id": job.job_id, "reason": removal.reason.value, "size_bytes": job.image_bytes}
                logger.info("job would be removed (dry run)", extra=facts)
        self._logged = frozenset(removal.job.job_id for removal in removals)


def _without(usage: Usage, removals: Sequence[Removal]) -> Usage:
    image_bytes = sum(removal.job.image_bytes for removal in removals)
    return Usage(usage.num_ended_jobs - len(removals), usage.image_bytes - image_bytes)
