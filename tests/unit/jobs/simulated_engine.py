"""The engine in made-up time: the real scheduler, ranks whose every duration the test decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from hidream_grpc.engine.protocol.messages import Decode
from hidream_grpc.engine.requests import StepReport
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import (
    free_ranks,
    next_decodes,
    next_forward,
    note_decodes,
    note_forward,
)
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.simulation import EngineCapacity, Estimates, JobWork, estimate_jobs
from hidream_grpc.jobs.store.step_room import MAX_CONSIDERED_JOBS, StepDemand, StepRoom
from hidream_grpc.model.parameters import GenerationParameters

SLICE_SECONDS = 0.05


@dataclass(frozen=True)
class Times:
    """What the ranks take; step_seconds gets width, height and samples."""

    step_seconds: Callable[[int, int, int], float]
    image_seconds: Callable[[int, int], float] = lambda _width, _height: 0.0
    encode_seconds: float = 0.0
    between_steps: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What was estimated of a job at one moment, and when that was."""

    job_id: str
    at_seconds: float
    in_seconds: float


@dataclass
class SimulatedEngine:
    """Runs jobs as the controller does, measures, and estimates now and then.

    Attributes:
        rounds_per_estimate: all is estimated after each so many rounds.
        starts, ends: of the jobs, in seconds.
        waits, rests: every estimate of a job that waited or ran.
    """

    times: Times
    capacity: EngineCapacity
    rounds_per_estimate: int = 1
    durations: MeasuredDurations = field(default_factory=MeasuredDurations)
    seconds: float = 0.0
    waiting: list[JobWork] = field(default_factory=list)
    running: dict[str, RunningRequest] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    waits: list[Estimate] = field(default_factory=list)
    rests: list[Estimate] = field(default_factory=list)

    def __post_init__(self) -> None:
        # What each rank is decoding, and the seconds that are left of it.
        self.decodes: dict[int, tuple[Decode, float]] = {}
        self.num_rounds = 0

    def run(self, arrivals: Iterable[tuple[float, JobWork]]) -> None:
        """Run all of these jobs to their ends."""
        arriving = sorted(arrivals, key=lambda arrival: arrival[0])
        while arriving or self.waiting or self.running:
            if not (self.waiting or self.running):
                self.seconds = max(self.seconds, arriving[0][0])
            while arriving and arriving[0][0] <= self.seconds:
                self.waiting.append(arriving.pop(0)[1])
            self._round()

    def estimate(self) -> Estimates:
        """Estimate as a server would now that has measured what this engine did."""
        running = [
            JobWork(
                job_id=job_id,
                caller=request.request.caller,
                priority=request.request.priority,
                parameters=request.request.parameters,
                step=request.step,
                finished_images=frozenset(range(request.request.parameters.num_images)) - request.undecoded,
            )
            for job_id, request in self.running.items()
        ]
        return estimate_jobs(self.durations, self.capacity, running, self.waiting)

    @property
    def wait_errors(self) -> list[float]:
        return self._errors(self.waits, self.starts)

    @property
    def rest_errors(self) -> list[float]:
        return self._errors(self.rests, self.ends)

    @staticmethod
    def _errors(estimates: list[Estimate], moments: dict[str, float]) -> list[float]:
        """The error of each estimate, relative to what came."""
        outcomes = [(e.in_seconds, moments[e.job_id] - e.at_seconds) for e in estimates]
        return [abs(estimated - actual) / actual for estimated, actual in outcomes if actual > 0]

    def _round(self) -> None:
        admitted = self._admit()
        if admitted:
            self.seconds += self.times.encode_seconds
            self.durations.note_prompts(self.times.encode_seconds)
        stepped = next_forward(self.running, self.capacity.max_step_pixels).claim_ids
        decodes = next_decodes(self.running, free_ranks(self.running, self.capacity.num_ranks))
        note_decodes(self.running, decodes)
        for decode in decodes:
            size = self.running[decode.claim_id].size
            self.decodes[decode.rank] = (decode, self.times.image_seconds(size.width, size.height))
        is_plain = not (admitted or self.decodes)
        step_seconds = self._step(stepped) if stepped else None
        self._decode(step_seconds)
        self.seconds += self.times.between_steps
        if step_seconds is not None:
            self._report(stepped, step_seconds, is_plain)
        for job_id in [job_id for job_id, request in self.running.items() if request.is_finished]:
            self.ends[job_id] = self.seconds
            del self.running[job_id]
        self.num_rounds += 1
        if self.num_rounds % self.rounds_per_estimate == 0:
            self._note_estimates()

    def _note_estimates(self) -> None:
        estimates = self.estimate()
        self.waits += [Estimate(j, self.seconds, seconds) for j, seconds in estimates.starts.items()]
        self.rests += [Estimate(j, self.seconds, seconds) for j, seconds in estimates.ends.items()]

    def _admit(self) -> bool:
        admitted = self._claim()
        for work in admitted:
            self.waiting.remove(work)
            self.running[work.job_id] = work.running_request()
            self.starts[work.job_id] = self.seconds
        return bool(admitted)

    def _claim(self) -> list[JobWork]:
        """Choose the jobs that start as a server does, whose queue is in this order."""
        running = (
            StepDemand.of(r.request.caller, r.request.priority, r.request.parameters, r.step)
            for r in self.running.values()
        )
        room = StepRoom(running, self.capacity.max_running_jobs, self.capacity.max_step_pixels)
        return [work for work in self.waiting[:MAX_CONSIDERED_JOBS] if room.take(work.demand)]

    def _step(self, stepped: tuple[str, ...]) -> float:
        size = self.running[stepped[0]].size
        step_seconds = self.times.step_seconds(size.width, size.height, self._num_samples(stepped))
        self.seconds += step_seconds
        note_forward(self.running, stepped, step_seconds)
        return step_seconds

    def _report(self, stepped: tuple[str, ...], step_seconds: float, is_plain: bool) -> None:
        round_seconds = step_seconds + self.times.between_steps if is_plain else None
        size, num_samples = self.running[stepped[0]].size, self._num_samples(stepped)
        self.durations.note_step(
            StepReport(
                step_seconds,
                size.width,
                size.height,
                num_samples,
                size.prompt_tokens,
                round_seconds=round_seconds,
            )
        )

    def _decode(self, budget_seconds: float | None) -> None:
        """Every rank goes on with its image, in slices, until the budget is spent."""
        spent: list[float] = [0.0]
        for rank, (decode, left) in list(self.decodes.items()):
            budget = left if budget_seconds is None else budget_seconds
            done = min(left, max(SLICE_SECONDS, budget))
            spent.append(done)
            self.decodes[rank] = (decode, left - done)
            if left - done <= 1e-9:
                del self.decodes[rank]
                request = self.running[decode.claim_id]
                width, height, _ = request.size
                self.durations.note_image(width, height, self.times.image_seconds(width, height))
                request.finish_image(decode.image_index)
        self.seconds += max(spent)

    def _num_samples(self, job_ids: tuple[str, ...]) -> int:
        return sum(self.running[job_id].request.parameters.num_samples for job_id in job_ids)


def work_of(
    number: int,
    width: int = 512,
    steps: int = 20,
    images: int = 1,
    caller: str = "caller",
    height: int = 0,
    step: int = 0,
) -> JobWork:
    """A job without guidance: as many samples as images."""
    parameters = GenerationParameters(
        prompt="a red circle",
        width=width,
        height=height or width,
        num_inference_steps=steps,
        guidance_scale=1.0,
        num_images=images,
        seed=0,
    )
    return JobWork(f"job {number}", caller, parameters, step)


def median_error(errors: list[float]) -> float:
    """The median; there must be errors to speak of."""
    assert len(errors) >= 10
    return median(errors)
