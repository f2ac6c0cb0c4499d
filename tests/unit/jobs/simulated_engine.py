"""The engine in made-up time: the real scheduler, ranks whose every duration the test decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median

from hidream_grpc.engine.protocol.messages import Decode
from hidream_grpc.engine.requests import EngineRequest, StepReport
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import free_ranks, next_decodes, next_forward, note_decodes, note_forward
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.simulation import (
    EngineCapacity,
    RemainingWork,
    estimate_ends,
    estimate_starts,
)
from hidream_grpc.model.parameters import GenerationParameters

SLICE_SECONDS = 0.05


@dataclass(frozen=True)
class Request:
    job_id: str
    caller: str
    parameters: GenerationParameters


@dataclass(frozen=True)
class Times:
    """What the ranks take; step_seconds gets width, height and samples."""

    step_seconds: Callable[[int, int, int], float]
    image_seconds: Callable[[int, int], float] = lambda _width, _height: 0.0
    encode_seconds: float = 0.0
    between_steps: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What was foreseen of a job at one moment, and when that was."""

    job_id: str
    at_seconds: float
    in_seconds: float


@dataclass
class SimulatedEngine:
    """Runs requests as the controller does, measures, and foresees after every round.

    Attributes:
        starts, ends: of the jobs, in seconds.
        waits, rests: every estimate of a job that waited or ran.
    """

    times: Times
    capacity: EngineCapacity
    durations: MeasuredDurations = field(default_factory=MeasuredDurations)
    seconds: float = 0.0
    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    waits: list[Estimate] = field(default_factory=list)
    rests: list[Estimate] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records: dict[str, RunningRequest] = {}
        self.waiting: list[Request] = []
        self.running: dict[str, Request] = {}
        self.images: dict[str, int] = {}
        self.decodes: dict[int, tuple[Decode, float]] = {}

    def run(self, arrivals: Iterable[tuple[float, Request]]) -> None:
        """Run all of these requests to their ends."""
        arriving = sorted(arrivals, key=lambda arrival: arrival[0])
        while arriving or self.waiting or self.running:
            if not (self.waiting or self.running):
                self.seconds = max(self.seconds, arriving[0][0])
            while arriving and arriving[0][0] <= self.seconds:
                self.waiting.append(arriving.pop(0)[1])
            self._round()

    def estimate_starts(self) -> dict[str, float]:
        return estimate_starts(self.durations, self.capacity, *self._work())

    def estimate_ends(self) -> dict[str, float]:
        return estimate_ends(self.durations, self.capacity, *self._work())

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
        return [abs(foreseen - actual) / actual for foreseen, actual in outcomes if actual > 0]

    def _round(self) -> None:
        admitted = self._admit()
        if admitted:
            self.seconds += self.times.encode_seconds
            self.durations.note_prompts(self.times.encode_seconds)
        stepped = next_forward(self.records, self.capacity.max_step_pixels).claim_ids
        decodes = next_decodes(self.records, free_ranks(self.records, self.capacity.num_ranks))
        note_decodes(self.records, decodes)
        for decode in decodes:
            size = self._size(decode.claim_id)
            self.decodes[decode.rank] = (decode, self.times.image_seconds(*size))
        is_plain = not (admitted or self.decodes)
        step_seconds = self._step(stepped) if stepped else None
        self._decode(step_seconds)
        self.seconds += self.times.between_steps
        if step_seconds is not None:
            self._report(stepped, step_seconds, is_plain)
        for job_id in [job_id for job_id in self.running if self.records[job_id].is_finished]:
            self.ends[job_id] = self.seconds
            del self.running[job_id]
            del self.records[job_id]
        self.waits += [Estimate(j, self.seconds, seconds) for j, seconds in self.estimate_starts().items()]
        self.rests += [Estimate(j, self.seconds, seconds) for j, seconds in self.estimate_ends().items()]

    def _admit(self) -> bool:
        admitted = False
        while self.waiting and len(self.records) < self.capacity.max_running_jobs:
            request = self.waiting.pop(0)
            self.running[request.job_id] = request
            self.images[request.job_id] = request.parameters.num_images
            self.records[request.job_id] = RunningRequest(
                EngineRequest(request.job_id, request.job_id, "", request.parameters, lambda _event: None)
            )
            self.starts[request.job_id] = self.seconds
            admitted = True
        return admitted

    def _step(self, stepped: tuple[str, ...]) -> float:
        samples = sum(self.running[job_id].parameters.num_samples for job_id in stepped)
        step_seconds = self.times.step_seconds(*self._size(stepped[0]), samples)
        self.seconds += step_seconds
        note_forward(self.records, stepped, step_seconds)
        return step_seconds

    def _report(self, stepped: tuple[str, ...], step_seconds: float, is_plain: bool) -> None:
        samples = sum(self.running[job_id].parameters.num_samples for job_id in stepped)
        round_seconds = step_seconds + self.times.between_steps if is_plain else None
        size = self._size(stepped[0])
        self.durations.note_step(StepReport(step_seconds, *size, samples, round_seconds=round_seconds))

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
                self.durations.note_image(
                    *self._size(decode.claim_id), self.times.image_seconds(*self._size(decode.claim_id))
                )
                self.records[decode.claim_id].finish_image(decode.image_index)
                self.images[decode.claim_id] -= 1
        self.seconds += max(spent)

    def _size(self, job_id: str) -> tuple[int, int]:
        parameters = self.running[job_id].parameters
        return parameters.width, parameters.height

    def _work(self) -> tuple[list[RemainingWork], list[RemainingWork]]:
        """What runs and what waits."""
        running = [self._remaining(r, self.records[job_id].step) for job_id, r in self.running.items()]
        return running, [self._remaining(request, 0) for request in self.waiting]

    def _remaining(self, request: Request, step: int) -> RemainingWork:
        parameters = request.parameters
        return RemainingWork(
            job_id=request.job_id,
            caller=request.caller,
            width=parameters.width,
            height=parameters.height,
            num_samples=parameters.num_samples,
            num_inference_steps=parameters.num_inference_steps,
            steps=parameters.num_inference_steps - step,
            images=self.images.get(request.job_id, parameters.num_images),
        )


def request(
    number: int, width: int = 512, steps: int = 20, images: int = 1, caller: str = "caller", height: int = 0
) -> Request:
    """A request without guidance: as many samples as images."""
    parameters = GenerationParameters(
        prompt="a red circle",
        width=width,
        height=height or width,
        num_inference_steps=steps,
        guidance_scale=1.0,
        num_images=images,
        seed=0,
    )
    return Request(f"job {number}", caller, parameters)


def median_error(errors: list[float]) -> float:
    """The median; there must be errors to speak of."""
    assert len(errors) >= 10
    return median(errors)
