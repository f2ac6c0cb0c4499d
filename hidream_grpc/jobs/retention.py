"""Which jobs that have ended are forgotten, with their images, and when."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from hidream_grpc.jobs.store.records import EndedJob, Usage

logger = logging.getLogger(__name__)

MAX_JOBS_READ = 1000
"""At once; a sweep goes on until all that goes is gone."""


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """What is kept of jobs that have ended.

    Attributes:
        retention_seconds: how long each is kept after its end, at most.
        max_retained_jobs: how many; None for any number.
        max_retained_bytes: images of all of them; None for any number.
        is_dry_run: tell what would go, and keep it.
    """

    retention_seconds: float
    max_retained_jobs: int | None = None
    max_retained_bytes: int | None = None
    is_dry_run: bool = False


class RemovalReason(StrEnum):
    """Why a job goes."""

    AGE = "age"
    NUMBER = "number"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Removal:
    """A job that goes."""

    job: EndedJob
    reason: RemovalReason


@dataclass(frozen=True, slots=True)
class RetentionReport:
    """What a sweep left, and what it removed; a dry run removes nothing."""

    num_retained_jobs: int
    retained_bytes: int
    num_removed: Mapping[RemovalReason, int]


class EndedJobs(Protocol):
    """What is asked of the job store (`jobs/store/store.py`)."""

    async def ended(self, before_time: float | None = None, limit: int = 100) -> tuple[EndedJob, ...]:
        """Jobs that have ended, the oldest end first."""

    async def usage(self) -> Usage:
        """How much is kept of all of them."""


def choose_removals(
    oldest: Sequence[EndedJob], usage: Usage, limits: RetentionLimits, now: float
) -> tuple[Removal, ...]:
    """The jobs that go, oldest first: those that are too old, then more while too much is left.

    Args:
        oldest: the jobs that ended first, in this order; there may be more.
        usage: of all jobs that have ended.
        limits: of what is kept.
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


class Retention:
    """Applies the limits to what is in the store, each time that it is asked to."""

    def __init__(
        self,
        limits: RetentionLimits,
        jobs: EndedJobs,
        remove: Callable[[str], Awaitable[None]],
        is_read: Callable[[str], bool],
        observe: Callable[[RetentionReport], None],
    ) -> None:
        """Take what removes a job with its images, what knows its readers, and what hears of every sweep."""
        self._limits = limits
        self._jobs = jobs
        self._remove = remove
        self._is_read = is_read
        self._observe = observe
        self._told: frozenset[str] = frozenset()

    async def sweep(self, now: float) -> RetentionReport:
        """Remove what goes, oldest first; in a dry run say once of each job that it would go.

        A job that somebody reads here stays until the next sweep.

        Raises:
            HiDreamError: whatever `remove` or the store raises. What went before is reported, the rest is
                the next sweep's.
        """
        num_removed: Counter[RemovalReason] = Counter()
        try:
            while await self._sweep_some(now, num_removed):
                pass
        finally:
            usage = await self._jobs.usage()
            report = RetentionReport(usage.num_ended_jobs, usage.image_bytes, dict(num_removed))
            self._observe(report)
        return report

    async def _sweep_some(self, now: float, num_removed: Counter[RemovalReason]) -> bool:
        """Returns whether there may be more to remove."""
        oldest = await self._jobs.ended(limit=MAX_JOBS_READ)
        removals = choose_removals(oldest, await self._jobs.usage(), self._limits, now)
        if self._limits.is_dry_run:
            self._tell(removals)
            return False
        num_before = num_removed.total()
        for removal in removals:
            job = removal.job
            if self._is_read(job.job_id):
                continue
            await self._remove(job.job_id)
            num_removed[removal.reason] += 1
            logger.info("job removed", extra={"job_id": job.job_id, "reason": removal.reason.value})
        return len(removals) == MAX_JOBS_READ and num_removed.total() > num_before

    def _tell(self, removals: tuple[Removal, ...]) -> None:
        for removal in removals:
            job = removal.job
            if job.job_id not in self._told:
                facts = {"job_id": job.job_id, "reason": removal.reason.value, "size_bytes": job.image_bytes}
                logger.info("job would be removed (dry run)", extra=facts)
        self._told = frozenset(removal.job.job_id for removal in removals)
