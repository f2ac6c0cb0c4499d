"""What the jobs of this server can expect: how long they wait, and how long those that run still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

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
from hidream_grpc.jobs.estimates.simulation import (
    EngineCapacity,
    RemainingWork,
    estimate_ends,
    estimate_starts,
)
from hidream_grpc.jobs.job import Job

KEPT_SECONDS = 0.1
"""A view into the future is used for so long: steps can be short, and a view costs milliseconds."""


class _View:
    """Moments by job id, foreseen at one time."""

    def __init__(self, foresee: Callable[[], Mapping[str, float]], clock: Callable[[], float]) -> None:
        self._foresee = foresee
        self._clock = clock
        self._seconds: Mapping[str, float] = {}
        self._time: float | None = None

    def forget(self) -> None:
        self._time = None

    def seconds_until(self, job_id: str) -> float | None:
        now = self._clock()
        if self._time is None or now - self._time > KEPT_SECONDS:
            self._seconds = self._foresee()
            self._time = now
        seconds = self._seconds.get(job_id)
        return None if seconds is None else max(0.0, self._time + seconds - now)


class JobEstimator:
    """Learns from what the engine reports, and foresees what it will do with the jobs that it has.

    Belongs to the event loop's thread. What was learnt goes with the process: the first steps of the next
    one teach it again.

    Args:
        capacity: of the engine, as it is now.
        clock: seconds, from any start.
    """

    def __init__(
        self, capacity: Callable[[], EngineCapacity], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity = capacity
        self._durations = MeasuredDurations()
        self._running: dict[str, RemainingWork] = {}
        self._waiting: Sequence[RemainingWork] = ()
        self._starts = _View(self._estimate_starts, clock)
        self._ends = _View(self._estimate_ends, clock)

    def observe_step(self, report: StepReport) -> None:
        """Learn from a denoising step."""
        if not self._durations.has_steps:
            # There is something to see now.
            self._forget()
        self._durations.note_step(report)

    def observe(self, job_id: str, event: EngineEvent) -> None:
        """Learn from what the engine tells of a job that it has."""
        work = self._running.get(job_id)
        if work is None:
            return
        match event:
            case PromptsEncoded(encode_seconds):
                self._durations.note_prompts(encode_seconds)
            case StepFinished(step):
                self._running[job_id] = work.after_step(step)
                if step == work.num_inference_steps:
                    self._forget()
            case ImageFinished():
                self._durations.note_image(*work.size, event.decode_seconds)
                self._running[job_id] = work.after_image()
            case RequestRestarted():
                self._running[job_id] = work.after_step(event.resumed_from_step)
                self._forget()
            case RequestFinished() | RequestFailed():
                self.note_gone(job_id)
            case _:
                pass

    def note_taken(self, job: Job) -> None:
        """Note that the engine has a job, and has just begun it."""
        self._running[job.job_id] = RemainingWork.of(job)
        self._forget()

    def note_gone(self, job_id: str) -> None:
        """Note that the engine does not have a job any more; nothing happens when it did not."""
        if self._running.pop(job_id, None) is not None:
            self._forget()

    def note_waiting(self, waiting: Sequence[Job]) -> None:
        """Note all jobs that wait, in the order in which they will be taken."""
        self._waiting = tuple(RemainingWork.of(job) for job in waiting)
        self._forget()

    @property
    def next_start_seconds(self) -> float | None:
        """Until a place in the queue is free, since its job starts; None where that cannot be told."""
        starts = [self.wait_seconds(work.job_id) for work in self._waiting]
        return min((seconds for seconds in starts if seconds is not None), default=None)

    def wait_seconds(self, job_id: str) -> float | None:
        """Until a waiting job starts; None where that cannot be told."""
        return self._starts.seconds_until(job_id)

    def remaining_seconds(self, job_id: str) -> float | None:
        """Until a running job ends; None where that cannot be told."""
        return self._ends.seconds_until(job_id)

    def _forget(self) -> None:
        self._starts.forget()
        self._ends.forget()

    def _estimate_starts(self) -> Mapping[str, float]:
        return estimate_starts(
            self._durations, self._capacity(), tuple(self._running.values()), self._waiting
        )

    def _estimate_ends(self) -> Mapping[str, float]:
        return estimate_ends(self._durations, self._capacity(), tuple(self._running.values()), self._waiting)
