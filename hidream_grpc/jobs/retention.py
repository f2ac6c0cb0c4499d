"""Which jobs that have ended are forgotten, with their images, and when."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that has ended (seconds since the epoch), with the bytes of its images."""

    job_id: str
    end_time: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """What is kept.

    Attributes:
        retention_seconds: how long a job is kept after its end, at most.
        max_retained_bytes: images of all jobs that have ended; None for any number.
        is_dry_run: tell what would go, and keep it.
    """

    retention_seconds: float
    max_retained_bytes: int | None = None
    is_dry_run: bool = False


class RemovalReason(StrEnum):
    """Why a job goes."""

    AGE = "age"
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


def choose_removals(ended: Iterable[EndedJob], limits: RetentionLimits, now: float) -> tuple[Removal, ...]:
    """The jobs that go, oldest first: those that are too old, then more while too many bytes are left.

    Whatever the order of `ended`, the choice is the same, and no job goes before an older one.
    """
    jobs = sorted(ended, key=lambda job: (job.end_time, job.job_id))
    retained_bytes = sum(job.size_bytes for job in jobs)
    removals = []
    for job in jobs:
        if now - job.end_time > limits.retention_seconds:
            reason = RemovalReason.AGE
        elif limits.max_retained_bytes is not None and retained_bytes > limits.max_retained_bytes:
            reason = RemovalReason.BYTES
        else:
            break
        removals.append(Removal(job, reason))
        retained_bytes -= job.size_bytes
    return tuple(removals)


class Retention:
    """Applies the limits, each time that it is told which jobs have ended."""

    def __init__(
        self,
        limits: RetentionLimits,
        remove: Callable[[str], Awaitable[None]],
        observe: Callable[[RetentionReport], None],
    ) -> None:
        """Take what removes a job with its images, and what is told about every sweep."""
        self._limits = limits
        self._remove = remove
        self._observe = observe
        self._told: frozenset[str] = frozenset()

    async def sweep(self, ended: Iterable[EndedJob], now: float) -> RetentionReport:
        """Remove what goes, oldest first; in a dry run say once of each job that it would go.

        Raises:
            Exception: whatever `remove` raises. What went before is reported, the rest is the next sweep's.
        """
        jobs = list(ended)
        removals = choose_removals(jobs, self._limits, now)
        if self._limits.is_dry_run:
            self._tell(removals)
            removals = ()
        num_removed: Counter[RemovalReason] = Counter()
        retained_bytes = sum(job.size_bytes for job in jobs)
        try:
            for removal in removals:
                await self._remove(removal.job.job_id)
                num_removed[removal.reason] += 1
                retained_bytes -= removal.job.size_bytes
                logger.info(
                    "job removed",
                    extra={"job_id": removal.job.job_id, "reason": removal.reason.value},
                )
        finally:
            report = RetentionReport(len(jobs) - num_removed.total(), retained_bytes, dict(num_removed))
            self._observe(report)
        return report

    def _tell(self, removals: tuple[Removal, ...]) -> None:
        for removal in removals:
            job = removal.job
            if job.job_id not in self._told:
                facts = {"job_id": job.job_id, "reason": removal.reason.value, "size_bytes": job.size_bytes}
                logger.info("job would be removed (dry run)", extra=facts)
        self._told = frozenset(removal.job.job_id for removal in removals)
