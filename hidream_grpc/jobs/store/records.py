"""What the job store takes and gives besides jobs."""

from __future__ import annotations

from dataclasses import dataclass

from hidream_grpc.jobs.job import CancelReason, Job


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many jobs may wait, in all and of one caller, and what is said when it is too many."""

    max_queued_jobs: int
    max_queued_jobs_of_caller: int | None = None
    retry_after_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Page:
    """Jobs, newest first; the token is empty on the last page."""

    jobs: tuple[Job, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class AttachedCall:
    """A caller that waits for its job at a replica."""

    call_id: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class HeldClaim:
    """A claim that a replica has, and why others want its job stopped."""

    job_id: str
    claim_number: int
    cancel_reason: CancelReason | None


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A server that draws jobs of the store.

    Attributes:
        heartbeat: grows while it lives.
        model: what it told of its model when it came, as JSON.
    """

    replica_id: str
    heartbeat: int
    model: str


@dataclass(frozen=True, slots=True)
class EndedJob:
    """What retention has to know of a job that has ended."""

    job_id: str
    acceptance_number: int
    end_time: float
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """How much is kept of jobs that have ended."""

    num_ended_jobs: int
    image_bytes: int
