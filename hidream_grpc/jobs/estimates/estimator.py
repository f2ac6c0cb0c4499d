"""Estimates of how long the jobs of this server wait, and how long those that run still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hidream_grpc.engine.requests import (
    EngineEvent,
    ImageFinished,
    PromptsEncoded,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
    StepFinished,
    StepReport,
)
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.simulation import EngineCapacity, Estimates, JobWork, estimate_jobs
from hidream_grpc.jobs.job import Job

KEPT_SECONDS = 0.1
"""How long estimates are used: steps can be short, and estimating anew costs milliseconds."""


class JobEstimator:
    """Measures what the engine reports, and estimates when the jobs that it has, and those that wait, go on.

    All methods belong to the event loop's thread. The measured durations end with the process: the first
    steps of the next one are measured again.

    Args:
        capacity: of the engine, as it is now.
        clock: seconds, from any start.
    """

    def __init__(
        self, capacity: Callable[[], EngineCapacity], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity = capacity
        self._clock = clock
        self._durations = MeasuredDurations()
        self._running: dict[str, JobWork] = {}
        self._waiting: Sequence[JobWork] = ()
        self._estimates: Estimates | None = None
        self._estimate_time = 0.0

    def observe_step(self, report: StepReport) -> None:
        """Measure a denoising step."""
        if not self._durations.has_steps:
            # From now on there is something to estimate by.
            self._forget()
        self._durations.note_step(report)

    def observe(self, job_id: str, event: EngineEvent) -> None:
        """Measure what the engine reports of a job that it has, and how far that is."""
        work = self._running.get(job_id)
        if work is None:
            return
        match event:
            case PromptsEncoded(encode_seconds):
                self._durations.note_prompts(encode_seconds)
            case StepFinished(step):
                self._running[job_id] = replace(work, step=step)
                if step == work.parameters.num_inference_steps:
                    self._forget()
            case ImageFinished(image_index):
                parameters = work.parameters
                self._durations.note_image(parameters.width, parameters.height, event.decode_seconds)
                self._running[job_id] = replace(work, finished_images=work.finished_images | {image_index})
            case RequestRestarted():
                self._running[job_id] = replace(work, step=event.resumed_from_step)
                self._forget()
            case RequestFinished() | RequestFailed():
                self.note_gone(job_id)
            case _:
                pass

    def note_taken(self, job: Job) -> None:
        """Record that the engine has a job, and has just begun it."""
        self._running[job.job_id] = JobWork.of(job)
        self._forget()

    def note_gone(self, job_id: str) -> None:
        """Record that the engine does not have a job any more; nothing happens when it did not."""
        if self._running.pop(job_id, None) is not None:
            self._forget()

    def note_waiting(self, waiting: Sequence[Job]) -> None:
        """Record all jobs that wait, in the order in which they will be taken."""
        self._waiting = tuple(map(JobWork.of, waiting))
        self._forget()

    @property
    def next_start_seconds(self) -> float | None:
        """Seconds until a place in the queue is free, since its job starts; None where that is unknown."""
        return min(self._known_waits(), default=None)

    @property
    def last_start_seconds(self) -> float | None:
        """Seconds until the last of the jobs that wait starts; None where that is unknown, or none waits."""
        return max(self._known_waits(), default=None)

    def wait_seconds(self, job_id: str) -> float | None:
        """Seconds until a waiting job starts; None where that is unknown."""
        return self._seconds_until(self._newest().starts.get(job_id))

    def remaining_seconds(self, job_id: str) -> float | None:
        """Seconds until a job ends that runs or waits; None where that is unknown."""
        return self._seconds_until(self._newest().ends.get(job_id))

    def _known_waits(self) -> Iterator[float]:
        waits = (self.wait_seconds(work.job_id) for work in self._waiting)
        return (seconds for seconds in waits if seconds is not None)

    def _forget(self) -> None:
        self._estimates = None

    def _newest(self) -> Estimates:
        now = self._clock()
        if self._estimates is None or now - self._estimate_time > KEPT_SECONDS:
            # The list of those that wait may be older than the latest start.
            waiting = [work for work in self._waiting if work.job_id not in self._running]
            running = tuple(self._running.values())
            self._estimates = estimate_jobs(self._durations, self._capacity(), running, waiting)
            self._estimate_time = now
        return self._estimates

    def _seconds_until(self, seconds: float | None) -> float | None:
        """Take off the time since the estimate was made."""
        if seconds is None:
            return None
        return max(0.0, self._estimate_time + seconds - self._clock())
