"""When each job starts and ends, foreseen from measured times and the engine's own rules. Pure.

Between two events (a job takes its last step, or ends) the engine repeats itself: sizes take turns, the
requests of a size share forwards of at most `max_step_pixels`, and a rank that decodes does so for one
step's time between two steps (`engine/scheduler.py`). So whole stretches are jumped over, and hundreds of
jobs cost less than a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from hidream_grpc.jobs.estimates.durations import MeasuredDurations, Size
from hidream_grpc.jobs.job import Job

MAX_SIMULATED_JOBS = 64
"""Of those that wait; the others follow at the pace of the later half of these."""


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """What the engine does at a time.

    Attributes:
        max_running_jobs: that are denoised or decoded.
        max_running_jobs_of_caller: of these; None for any number.
        max_step_pixels: width × height × samples of one forward; a single job may exceed it.
        num_ranks: each decodes one image at a time.
    """

    max_running_jobs: int
    max_step_pixels: int
    num_ranks: int
    max_running_jobs_of_caller: int | None = None


@dataclass(frozen=True, slots=True)
class RemainingWork:
    """What a job still asks of the engine: steps and images; num_samples are its rows of one forward."""

    job_id: str
    caller: str
    width: int
    height: int
    num_samples: int
    num_inference_steps: int
    steps: int
    images: int

    @classmethod
    def of(cls, job: Job) -> RemainingWork:
        """Of a job that the engine has not begun, or goes on with from its snapshot."""
        parameters = job.submission.parameters
        num_steps = parameters.num_inference_steps
        return cls(
            job_id=job.job_id,
            caller=job.submission.caller,
            width=parameters.width,
            height=parameters.height,
            num_samples=parameters.num_samples,
            num_inference_steps=num_steps,
            steps=num_steps - (0 if job.snapshot is None else job.snapshot.step),
            images=parameters.num_images - len(job.images),
        )

    def after_step(self, step: int) -> RemainingWork:
        """Once so many steps are taken."""
        return replace(self, steps=self.num_inference_steps - step)

    def after_image(self) -> RemainingWork:
        """Once another image is decoded."""
        return replace(self, images=self.images - 1)

    @property
    def size(self) -> Size:
        """Width and height; only jobs of one size share a forward."""
        return self.width, self.height


def estimate_starts(
    durations: MeasuredDurations,
    capacity: EngineCapacity,
    running: Sequence[RemainingWork],
    waiting: Sequence[RemainingWork],
) -> dict[str, float]:
    """Seconds until each waiting job starts, by job id, as if nothing more were asked and nobody left.

    Args:
        durations: what was measured; while that is not one step, nothing is foreseen.
        capacity: of the engine.
        running: in the order of their start.
        waiting: in the order in which they will be taken.
    """
    starts: dict[str, float] = {}
    if not durations.has_steps:
        return starts
    simulation = _Simulation(durations, capacity, running, waiting[:MAX_SIMULATED_JOBS])
    while simulation.waiting:
        starts |= dict.fromkeys(simulation.admit(), simulation.seconds)
        simulation.advance()
    return starts | _later_starts(durations, waiting, starts)


def estimate_ends(
    durations: MeasuredDurations,
    capacity: EngineCapacity,
    running: Sequence[RemainingWork],
    waiting: Sequence[RemainingWork],
) -> dict[str, float]:
    """Seconds until each running job ends, by job id; arguments as of `estimate_starts`.

    Those that wait take the places of those that end.
    """
    ends: dict[str, float] = {}
    if not durations.has_steps:
        return ends
    missing = {work.job_id for work in running}
    simulation = _Simulation(durations, capacity, running, waiting[:MAX_SIMULATED_JOBS])
    while missing:
        simulation.admit()
        ended = missing.intersection(simulation.advance())
        ends |= dict.fromkeys(ended, simulation.seconds)
        missing -= ended
    return ends


@dataclass(slots=True)
class _Request:
    """A request on its way; pace is what it does in a second of what is left."""

    work: RemainingWork
    steps: float
    # Of one rank.
    decode_seconds: float
    pace: float = 0.0

    @property
    def left(self) -> float:
        """Steps, or seconds of decoding once those are done."""
        return self.steps or self.decode_seconds

    def go_on(self, elapsed_seconds: float) -> None:
        left = _less(self.left, elapsed_seconds * self.pace)
        if self.steps:
            self.steps = left
        else:
            self.decode_seconds = left


class _Simulation:
    """The engine from now on.

    Attributes:
        waiting: who has not started yet.
        seconds: the time that it has come to.
    """

    def __init__(
        self,
        durations: MeasuredDurations,
        capacity: EngineCapacity,
        running: Sequence[RemainingWork],
        waiting: Sequence[RemainingWork],
    ) -> None:
        self.waiting = list(waiting)
        self.seconds = 0.0
        self._durations = durations
        self._capacity = capacity
        self._requests = [self._request(work) for work in running]
        # Read by those that were admitted, while nobody steps.
        self._encode_seconds = 0.0

    def _request(self, work: RemainingWork) -> _Request:
        return _Request(work, work.steps, work.images * self._durations.image_seconds(*work.size))

    def admit(self) -> list[str]:
        """Start those for which there is room now; a caller that has enough running is passed over."""
        admitted: list[str] = []
        limit = self._capacity.max_running_jobs_of_caller
        callers = Counter(request.work.caller for request in self._requests)
        for work in tuple(self.waiting):
            if len(self._requests) >= self._capacity.max_running_jobs:
                break
            if limit is None or callers[work.caller] < limit:
                callers[work.caller] += 1
                self.waiting.remove(work)
                self._requests.append(self._request(work))
                admitted.append(work.job_id)
        self._encode_seconds = self._durations.encode_seconds if admitted else 0.0
        return admitted

    def advance(self) -> list[str]:
        """Go on to the next event; returns the jobs that have ended with it."""
        self._set_paces()
        elapsed = min(
            # What came with nothing left to do has no pace.
            (r.left / r.pace if r.left else 0.0 for r in self._requests if r.pace or not r.left),
            default=0.0,
        )
        self.seconds += self._encode_seconds + elapsed
        for request in self._requests:
            request.go_on(elapsed)
        ended = [r.work.job_id for r in self._requests if not r.left]
        self._requests = [r for r in self._requests if r.left]
        return ended

    def _set_paces(self) -> None:
        rounds = _Rounds.of(self._durations, self._capacity, [r for r in self._requests if r.steps])
        round_seconds = rounds.mean_seconds
        free_ranks = self._capacity.num_ranks
        decoding = [r for r in self._requests if r.left and not r.steps]
        for request in decoding:
            # The oldest goes first.
            image_seconds = self._durations.image_seconds(*request.work.size)
            at_once = min(free_ranks, math.ceil(request.decode_seconds / image_seconds))
            free_ranks -= at_once
            slice_seconds = rounds.slice_seconds(image_seconds)
            # Of a round, until it is known how long that is.
            request.pace = at_once * slice_seconds
            if at_once:
                round_seconds = max(round_seconds, rounds.mean_seconds + slice_seconds)
        for request in decoding:
            request.pace /= round_seconds
        for request in self._requests:
            if request.steps:
                request.pace = rounds.steps[request.work.size] / (rounds.number * round_seconds)


@dataclass(slots=True)
class _Rounds:
    """The rounds in which every request of every size has had its turn.

    Attributes:
        number: forwards of all sizes; 0 where nobody steps.
        seconds: of all, without images that are decoded in between.
        step_seconds: of these, those of the steps.
        steps: that each request of a size takes meanwhile.
    """

    number: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    steps: dict[Size, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, durations: MeasuredDurations, capacity: EngineCapacity, stepping: Sequence[_Request]
    ) -> _Rounds:
        sizes: dict[Size, list[int]] = {}
        for request in stepping:
            sizes.setdefault(request.work.size, []).append(request.work.num_samples)
        rounds = cls()
        for (width, height), samples in sizes.items():
            mean_samples = sum(samples) / len(samples)
            room = capacity.max_step_pixels // (width * height)
            sharing = min(len(samples), max(1, int(room / mean_samples)))
            number = math.ceil(len(samples) / sharing)
            step_seconds = durations.step_seconds(width, height, round(sharing * mean_samples))
            rounds.number += number
            rounds.step_seconds += number * step_seconds
            rounds.seconds += number * (step_seconds + durations.seconds_between_steps)
            # A forward that is not full with those that wait is filled up with others.
            rounds.steps[width, height] = number * sharing / len(samples)
        return rounds

    @property
    def mean_seconds(self) -> float:
        """Of one round; 0 where nobody steps."""
        return self.seconds / self.number if self.number else 0.0

    def slice_seconds(self, image_seconds: float) -> float:
        """What a rank does for an image in one round: at most what a step takes, any time without steps."""
        if not self.number:
            return 1.0
        return image_seconds / math.ceil(image_seconds * self.number / self.step_seconds)


def _less(amount: float, done: float) -> float:
    """What is left; nothing rather than a rounding error."""
    left = amount - done
    return left if left > 1e-9 * amount else 0.0


def _later_starts(
    durations: MeasuredDurations, waiting: Sequence[RemainingWork], known_starts: Mapping[str, float]
) -> dict[str, float]:
    """Of those behind the ones that were simulated, by the work in front of them."""
    if len(waiting) <= MAX_SIMULATED_JOBS:
        return {}
    amounts = [_alone_seconds(durations, work) for work in waiting]
    half = MAX_SIMULATED_JOBS // 2
    last_start = max(known_starts.values())
    middle_start = max(known_starts[work.job_id] for work in waiting[:half])
    pace = (last_start - middle_start) / sum(amounts[half:MAX_SIMULATED_JOBS])
    in_front = accumulate(amounts[MAX_SIMULATED_JOBS - 1 :])
    later = waiting[MAX_SIMULATED_JOBS:]
    return {work.job_id: last_start + pace * amount for work, amount in zip(later, in_front, strict=False)}


def _alone_seconds(durations: MeasuredDurations, work: RemainingWork) -> float:
    """What a job would take with the engine to itself."""
    step_seconds = durations.step_seconds(work.width, work.height, work.num_samples)
    return work.steps * step_seconds + work.images * durations.image_seconds(*work.size)
