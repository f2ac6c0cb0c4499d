"""The values that the job store takes and returns besides jobs."""

from __future__ import annotations

from dataclasses import dataclass

from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.store.order import WaitingJob


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many jobs may wait, in all and of one caller, and when to try again beyond that."""

    max_queued_jobs: int
    max_queued_jobs_of_caller: int | None = None
    retry_after_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Page:
    """A page of jobs, newest first; the token is empty on the last page."""

    jobs: tuple[Job, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class AttachedCall:
    """A caller that waits for its job at a replica."""

    call_id: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class HeldClaim:
    """A claim that a replica has, and why its job is to stop, if it is."""

    job_id: str
    claim_number: int
    cancel_reason: CancelReason | None


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A server that runs jobs of the store.

    Attributes:
        heartbeat: a number that grows while the server lives.
        model: its description of its model when it joined, as JSON.
    """

    replica_id: str
    heartbeat: int
    model: str


@dataclass(frozen=True, slots=True)
class EndedJob:
    """The facts that retention needs about a job that has ended."""

    job_id: str
    acceptance_number: int
    end_time: float
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """How much is kept of jobs that have ended."""

    num_ended_jobs: int
    image_bytes: int


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job that no replica has and that was not begun.

    Attributes:
        waiting: what its place in the order follows from.
    """

    waiting: WaitingJob
    job: Job
