"""Estimates of how long the jobs of this server wait, and how long those that run still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from hidream_grpc.jobs.estimates.accuracy import EstimateAccuracy
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.newcomer import newcomer_slowdown, newcomer_start
from hidream_grpc.jobs.estimates.overtaking import Overtaking
from hidream_grpc.jobs.estimates.simulation import (
    MAX_SIMULATED_JOBS,
    EngineCapacity,
    Estimates,
    JobWork,
    estimate_jobs,
)
from hidream_grpc.jobs.job import Job, Submission

_NEW_JOB = ""
"""Stands for the id of a job that has none yet."""

KEPT_SECONDS = 0.1
"""How long estimates are used: steps can be short, and estimating anew costs milliseconds."""
MAX_SHARE = 1 / 600
"""Share of the time that estimating may take while nothing begins or ends. Beyond that the jobs of a long
queue take five times as much; a short one is estimated again at once."""


@dataclass(frozen=True, slots=True)
class EarliestEnd:
    """When a job that comes now ends at the earliest, as far as estimates have been wrong until now.

    Attributes:
        seconds: until its end, behind the jobs that are there.
        alone_seconds: until its end if it had the engine to itself.
    """

    seconds: float
    alone_seconds: float


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
        self._accuracy = EstimateAccuracy()
        # Of the steps that were measured.
        self._layout = ""
        self._running: dict[str, JobWork] = {}
        self._waiting: list[JobWork] = []
        self._overtaking = Overtaking()
        self._estimates: Estimates | None = None
        self._estimate_time = 0.0
        self._estimate_seconds = 0.0
        self._is_outdated = False

    def observe_step(self, report: StepReport) -> None:
        """Measure a denoising step; the first one of another layout takes the place of all before it."""
        layout = self._capacity().layout
        if layout != self._layout:
            self._layout, self._durations, self._accuracy = layout, MeasuredDurations(), EstimateAccuracy()
        if not self._durations.has_steps:
            # From now on there is something to estimate by.
            self._forget()
        self._durations.note_step(report, self._clock())

    def observe(self, job_id: str, event: EngineEvent) -> None:
        """Measure what the engine reports of a job that it has, and how far that is."""
        work = self._running.get(job_id)
        if work is None:
            return
        match event:
            case PromptsEncoded(encode_seconds):
                self._durations.note_prompts(encode_seconds, self._clock())
            case StepFinished(step):
                self._running[job_id] = replace(work, step=step)
                if step == work.parameters.num_inference_steps:
                    self._forget()
            case ImageFinished(image_index):
                parameters = work.parameters
                size = parameters.width, parameters.height
                self._durations.note_image(*size, event.decode_seconds, self._clock())
                self._running[job_id] = replace(work, finished_images=work.finished_images | {image_index})
            case RequestRestarted():
                self._running[job_id] = replace(work, step=event.resumed_from_step)
                self._forget()
            case RequestFinished():
                self._accuracy.note_end(job_id, self._clock())
                self.note_gone(job_id)
            case RequestFailed():
                self.note_gone(job_id)
            case _:
                pass

    def note_taken(self, job: Job) -> None:
        """Record that the engine has a job, and has just begun it."""
        taken = JobWork.of(job)
        self._running[job.job_id] = taken
        self._overtaking.forget(job.job_id)
        # Those further behind are overtaken by jobs that wait already, too.
        overtaken = (
            work.job_id
            for work in self._waiting[:MAX_SIMULATED_JOBS]
            if work.priority < taken.priority and work.create_time < taken.create_time
        )
        self._overtaking.note_start(overtaken, self._clock())
        self._forget()

    def note_gone(self, job_id: str) -> None:
        """Record that the engine does not have a job any more; nothing happens when it did not."""
        self._accuracy.forget(job_id)
        if self._running.pop(job_id, None) is not None:
            self._forget()

    def note_waiting(self, waiting: Sequence[JobWork]) -> None:
        """Record all jobs that wait, in the order in which they will be taken."""
        self._waiting = list(waiting)
        self._forget()

    def note_newest(self, work: JobWork, num_before: int) -> None:
        """Record a job that has just begun to wait behind so many of those that were recorded."""
        self._waiting.insert(num_before, work)
        if self._estimates is None or not self._estimates.add(self._durations, self._waiting, num_before):
            self._forget()

    @property
    def next_start_seconds(self) -> float | None:
        """Seconds until a place in the queue is free, since its job starts; None where that is unknown."""
        return self._seconds_until(min(self._newest().starts.values(), default=None))

    @property
    def last_start_seconds(self) -> float | None:
        """Seconds until the last of the jobs that wait starts; None where that is unknown, or none waits."""
        return self._seconds_until(max(self._newest().starts.values(), default=None))

    def wait_seconds(self, job_id: str) -> float | None:
        """Seconds until a waiting job starts; None where that is unknown."""
        seconds = self._seconds_until(self._newest(job_id).starts.get(job_id))
        return None if seconds is None else max(seconds, self._overtaking.seconds_to_come(job_id))

    def remaining_seconds(self, job_id: str) -> float | None:
        """Seconds until a job ends that runs or waits; None where that is unknown."""
        estimates = self._newest(job_id)
        seconds = self._seconds_until(estimates.ends.get(job_id))
        if seconds is None or job_id not in estimates.starts:
            return seconds
        own_seconds = estimates.ends[job_id] - estimates.starts[job_id]
        return max(seconds, self._overtaking.seconds_to_come(job_id) + own_seconds)

    def late_end(self, submission: Submission, deadline_seconds: float) -> EarliestEnd | None:
        """When a request would end at the earliest if it were accepted now and would then be too late.

        None where it may be in time, or where that is not known well enough: not enough steps of its shape
        were measured lately and on the layout of now, or too few jobs have ended whose estimates show how
        wrong these are. Where nothing runs, only what takes too long alone is too late. The estimates that
        are there are used; only the job itself is simulated.
        """
        work = JobWork(_NEW_JOB, submission.caller, submission.parameters, priority=submission.priority)
        share, capacity = self._accuracy.earliest_share, self._capacity()
        if share is None or capacity.layout != self._layout or not self._has_recent_steps(work):
            return None
        alone_seconds = estimate_jobs(self._durations, capacity, (), (work,)).ends[_NEW_JOB]
        seconds = alone_seconds
        if self._running and share * alone_seconds <= deadline_seconds:
            estimates, waiting = self._newest(), self._waiting
            start_seconds = newcomer_start(work, estimates, capacity, self._running, waiting)
            slowdown = newcomer_slowdown(estimates, self._durations, self._running.values(), waiting)
            own_seconds = max(alone_seconds, slowdown * work.seconds_alone(self._durations))
            seconds = (self._seconds_until(start_seconds) or 0.0) + own_seconds
        is_late = share * seconds > deadline_seconds
        return EarliestEnd(share * seconds, share * alone_seconds) if is_late else None

    def _has_recent_steps(self, work: JobWork) -> bool:
        parameters = work.parameters
        shape = parameters.width, parameters.height, parameters.num_samples, parameters.prompt_tokens
        return self._durations.has_recent_steps(*shape, self._clock())

    def _forget(self) -> None:
        self._is_outdated = True

    def _newest(self, job_id: str | None = None) -> Estimates:
        """The estimates, made anew where they are too old, or do not know a job that has come."""
        now = self._clock()
        if self._estimates is None or self._is_due(now - self._estimate_time, job_id):
            # The list of those that wait may be older than the latest start.
            waiting = [work for work in self._waiting if work.job_id not in self._running]
            running = tuple(self._running.values())
            self._estimates = estimate_jobs(self._durations, self._capacity(), running, waiting)
            self._estimate_time = now
            self._estimate_seconds = self._clock() - now
            self._is_outdated = False
            for work in (*running, *waiting[:MAX_SIMULATED_JOBS]):
                if (end := self._estimates.ends.get(work.job_id)) is not None:
                    self._accuracy.expect(work.job_id, now, end)
        return self._estimates

    def _is_due(self, age_seconds: float, job_id: str | None) -> bool:
        rest_seconds = self._estimate_seconds / MAX_SHARE
        if not self._is_outdated:
            return age_seconds > max(KEPT_SECONDS, rest_seconds)
        is_unknown = job_id is not None and self._estimates is not None and job_id not in self._estimates.ends
        is_short = len(self._waiting) <= MAX_SIMULATED_JOBS
        return is_unknown or is_short or age_seconds >= rest_seconds / 5

    def _seconds_until(self, seconds: float | None) -> float | None:
        """Take off the time since the estimate was made."""
        if seconds is None:
            return None
        return max(0.0, self._estimate_time + seconds - self._clock())
