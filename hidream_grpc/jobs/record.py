"""A job of this server with its events: each change of the job is told to its readers as it is made."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.events import (
    Cancelled,
    Failed,
    JobFeed,
    Previewed,
    Progressed,
    Restarted,
    Started,
    Succeeded,
)
from hidream_grpc.jobs.job import CancelReason, Execution, Job, JobState, Progress, StoredImage


@dataclass(slots=True)
class JobRecord:
    """The newest state of a job, and what its service must remember besides.

    Attributes:
        job: as it is now.
        feed: what its readers follow.
        deadline: stops the job when its caller's deadline passes.
        expiry: removes the job after its retention.
        tasks: that store its images.
        num_readers: who follow it now.
        is_forgotten: its service does not know it any more, but for its readers.
    """

    job: Job
    feed: JobFeed
    deadline: asyncio.TimerHandle | None = None
    expiry: asyncio.TimerHandle | None = None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    num_readers: int = 0
    is_forgotten: bool = False
    # Of this attempt; None until its first step has ended.
    _denoise_start: float | None = None
    # Of the steps that another attempt goes on after.
    _kept_denoise_seconds: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the job's last event was told."""
        return self.job.state.has_ended

    def start(self, execution: Execution) -> None:
        """The job left the queue."""
        self.job = self.job.started(execution, time.time())
        self.feed.publish(Started(self.job.submission.parameters, execution, self.job.timings.queue_seconds))

    def encoded(self, encode_seconds: float) -> None:
        """The prompts were read."""
        self.job = self.job.encoded(encode_seconds)

    def step_finished(self, step: int, step_seconds: float, remaining_seconds: float | None) -> None:
        """A denoising step ended now; the job is likely to end after the remaining time."""
        now = time.monotonic()
        if self._denoise_start is None:
            # An attempt's first step is told when it has ended.
            self._denoise_start = now - step_seconds
        total_steps = self.job.submission.parameters.num_inference_steps
        progress = Progress(step, total_steps, step_seconds, remaining_seconds)
        denoise_seconds = self._kept_denoise_seconds + now - self._denoise_start
        self.job = self.job.progressed(progress, denoise_seconds)
        self.feed.publish(Progressed(progress))

    def previewed(self, step: int, data: bytes) -> None:
        """A small JPEG of the unfinished image is there."""
        self.feed.publish(Previewed(step, data))

    def restart(self, attempt: int, reason: str, resumed_from_step: int) -> None:
        """The rank group was lost, and the job goes on."""
        self._denoise_start = None
        self._kept_denoise_seconds = self.job.timings.denoise_seconds if resumed_from_step else 0.0
        self.job = self.job.restarted(attempt, resumed_from_step)
        self.feed.publish(Restarted(attempt, reason, resumed_from_step))

    def add_image(self, image: StoredImage, decode_seconds: float) -> None:
        """An image is finished and stored."""
        self.job = self.job.with_image(image, decode_seconds)
        self.feed.publish_image(image)

    def succeed(self) -> None:
        """All images are stored."""
        self.job = self.job.ended(JobState.SUCCEEDED, time.time())
        self.feed.publish(Succeeded(self.job))

    def fail(self, error: HiDreamError) -> None:
        """The job cannot be finished."""
        self.job = self.job.ended(JobState.FAILED, time.time(), error)
        self.feed.publish(Failed(error))

    def cancel(self, reason: CancelReason, error: HiDreamError) -> None:
        """The job was stopped."""
        self.job = self.job.ended(JobState.CANCELLED, time.time(), error)
        self.feed.publish(Cancelled(reason, error))
