"""When each job starts and ends, estimated by running the engine's own scheduler in made-up time. Pure.

The order in which jobs start is the queue's (`jobs/store/order.py`), and who steps and decodes in a round
is decided by `engine/scheduler.py`. Only the durations are estimates, and how often a round is repeated:
the next rounds are run one by one, and one that is far off stands for several like it. So the number of
rounds grows with the logarithm of the work, and an estimate is as coarse as what it is of is far off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Self

from hidream_grpc.engine.requests import EngineEvent, EngineRequest, Priority
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import (
    free_ranks,
    next_decodes,
    next_forward,
    note_decodes,
    note_forward,
)
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store.order import claimable
from hidream_grpc.jobs.store.step_room import MAX_CONSIDERED_JOBS, StepDemand, StepRoom
from hidream_grpc.model.parameters import GenerationParameters, SampleSize

MAX_SIMULATED_JOBS = 32
"""Number of waiting jobs that are simulated; the others follow at the pace of the later half of these."""
COARSENESS = 1 / 480
"""How much more often a far round is repeated than the one before it: a share, for each simulated job."""


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """How much the engine does at the same time.

    Attributes:
        max_running_jobs: jobs of a priority or a higher one that are denoised or decoded.
        max_running_jobs_of_caller: jobs of one caller among these; None for any number.
        max_step_pixels: width × height × samples of one forward; a single job may exceed it.
        num_ranks: ranks, each of which decodes one image at a time.
        step_pixels_by_size: `max_step_pixels` of these sizes, where it is less.
        layout: of the ranks; what was measured on another one says little.
    """

    max_running_jobs: int
    max_step_pixels: int
    num_ranks: int
    max_running_jobs_of_caller: int | None = None
    step_pixels_by_size: Mapping[SampleSize, int] = field(default_factory=dict)
    layout: str = ""


@dataclass(frozen=True)
class JobWork:
    """A job, and how much of it is done.

    Attributes:
        step: denoising steps that it has taken.
        finished_images: indices of its images that are decoded.
        create_time: of its acceptance, in seconds.
    """

    job_id: str
    caller: str
    parameters: GenerationParameters
    step: int = 0
    finished_images: frozenset[int] = frozenset()
    priority: Priority = Priority.NORMAL
    create_time: float = 0.0

    @classmethod
    def of(cls, job: Job) -> Self:
        """The work of a job that the engine has not begun, or goes on with from its snapshot."""
        return cls(
            job_id=job.job_id,
            caller=job.submission.caller,
            parameters=job.submission.parameters,
            step=0 if job.snapshot is None else job.snapshot.step,
            finished_images=frozenset(image.index for image in job.images),
            priority=job.submission.priority,
            create_time=job.create_time,
        )

    def running_request(self) -> RunningRequest:
        """The record that the engine's policies read; it reports to nobody."""
        request = EngineRequest(
            claim_id=self.job_id,
            job_id=self.job_id,
            request_id="",
            parameters=self.parameters,
            on_event=_ignore,
            finished_images=self.finished_images,
            caller=self.caller,
            priority=self.priority,
        )
        return RunningRequest(request, step=self.step)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """All that `seconds_alone` depends on: a step's shape, and how many steps and images are left."""
        parameters = self.parameters
        num_steps = parameters.num_inference_steps - self.step
        num_images = parameters.num_images - len(self.finished_images)
        step_shape = (parameters.width, parameters.height, parameters.num_samples, parameters.prompt_tokens)
        return *step_shape, num_steps, num_images

    @cached_property
    def demand(self) -> StepDemand:
        """What it asks of the engine's steps."""
        return StepDemand.of(self.caller, self.priority, self.parameters, self.step)

    def seconds_alone(self, durations: MeasuredDurations) -> float:
        """How long it would take with the engine to itself."""
        width, height, num_samples, prompt_tokens, num_steps, num_images = self.shape
        step_seconds = durations.step_seconds(width, height, num_samples, prompt_tokens)
        return num_steps * step_seconds + num_images * durations.image_seconds(width, height)


@dataclass(frozen=True, slots=True)
class Estimates:
    """Seconds from now by job id.

    Attributes:
        starts: until each waiting job starts, in the order of the queue.
        ends: until each job ends, those that run first.
        pace: seconds between the starts of the last jobs, for each second that one takes alone; 0 where all
            jobs were simulated.
        slowdown: how many times as long as alone each of them takes.
    """

    starts: dict[str, float]
    ends: dict[str, float]
    pace: float = 0.0
    slowdown: float = 0.0

    def add(self, durations: MeasuredDurations, waiting: Sequence[JobWork], index: int) -> bool:
        """Estimate a job that has just come, from the one before it.

        Returns:
            Whether that is possible: otherwise all must be estimated anew.
        """
        before, work = waiting[index - 1], waiting[index]
        if not self.pace or index < MAX_SIMULATED_JOBS or before.job_id not in self.starts:
            return False
        start_seconds = self.starts[before.job_id] + self.pace * before.seconds_alone(durations)
        self.starts[work.job_id] = start_seconds
        self.ends[work.job_id] = start_seconds + self.slowdown * work.seconds_alone(durations)
        return True


def estimate_jobs(
    durations: MeasuredDurations,
    capacity: EngineCapacity,
    running: Sequence[JobWork],
    waiting: Sequence[JobWork],
) -> Estimates:
    """Estimate when jobs start and end, as if no job came and none were cancelled.

    Only the first `MAX_SIMULATED_JOBS` of those that wait are simulated: what is far off changes before it
    comes, so the others follow at the pace of these, by the work in front of them.

    Args:
        durations: what was measured; while that is not one step, nothing is estimated.
        capacity: of the engine.
        running: jobs in the order of their start.
        waiting: jobs in the order of the queue.
    """
    if not durations.has_steps:
        return Estimates({}, {})
    simulated = waiting[:MAX_SIMULATED_JOBS]
    simulation = Simulation(durations, capacity, running, simulated)
    while not simulation.is_over:
        simulation.run_round()
    starts = {work.job_id: simulation.starts[work.job_id] for work in simulated}
    ends = {work.job_id: simulation.ends[work.job_id] for work in (*running, *simulated)}
    return _with_later_jobs(durations, waiting, starts, ends)


class Simulation:
    """The engine from now on.

    A rotation is the rounds in which every job that steps has its turn. While nothing begins or ends, one
    is like the other: it is repeated at once until shortly before the next end. That alone does not bound the
    number of rounds, so late ones are repeated beyond the ends of jobs, which then have fewer steps in them;
    others start after such a rotation.

    Attributes:
        waiting: jobs that have not started yet.
        seconds: the time that it has come to.
        starts, ends: when jobs have started and ended.
    """

    def __init__(
        self,
        durations: MeasuredDurations,
        capacity: EngineCapacity,
        running: Sequence[JobWork],
        waiting: Sequence[JobWork],
    ) -> None:
        self.waiting = {work.job_id: work for work in waiting}
        self._due = _due_jobs(waiting)
        self.seconds = 0.0
        self.starts: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self._durations = durations
        self._encode_seconds = durations.encode_seconds
        self._seconds_between_steps = durations.seconds_between_steps
        self._capacity = capacity
        self._running: dict[str, RunningRequest] = {}
        self._num_running: Counter[str] = Counter()
        # Of those that run, in the same order.
        self._stepping: dict[str, RunningRequest] = {}
        self._denoised: dict[str, RunningRequest] = {}
        # What is left of each image that a rank is decoding, by job and index.
        self._decode_seconds: dict[tuple[str, int], float] = {}
        self._rotation = _Rotation()
        self._has_room = True
        self._num_rounds = 0
        self._coarseness = COARSENESS * (len(running) + len(waiting))
        for work in running:
            self._start(work)

    @property
    def is_over(self) -> bool:
        """Whether every job has ended."""
        return not (self.waiting or self._running)

    def run_round(self) -> None:
        """Do what the controller does in its next round, or in several like it."""
        # Of rounds that stand for several only the whole rotation is like what the controller does.
        if self._rotation.num_repeats == 1 or self._rotation.is_over(self._stepping):
            self._start_next()
        forward = next_forward(
            self._stepping, self._capacity.max_step_pixels, self._capacity.step_pixels_by_size
        ).claim_ids
        if self._denoised:
            self._start_decodes()
        if forward:
            self._decode(self._take_steps(forward))
        else:
            self._decode(min(self._decode_seconds.values(), default=0.0))
        if self._denoised:
            self._end_finished()

    def _end_finished(self) -> None:
        """End the jobs whose images are all decoded."""
        for job_id in [job_id for job_id, request in self._denoised.items() if request.is_finished]:
            # Of a step it has made room at its last one.
            self._has_room |= (
                self._capacity.max_running_jobs_of_caller is not None
                or len(self._running) >= self._capacity.max_running_jobs
            )
            self.ends[job_id] = self.seconds
            self._num_running[self._running.pop(job_id).request.caller] -= 1
            del self._denoised[job_id]

    def _start_next(self) -> None:
        """Start the jobs for which there is room; their prompts are encoded together."""
        if not (self._has_room and self.waiting):
            return
        # No other job starts before one has taken its last step or has ended.
        self._has_room = False
        started = self._next_to_start()
        for work in started:
            self.starts[work.job_id] = self.seconds
            del self.waiting[work.job_id]
            self._start(work)
        if started:
            self.seconds += self._encode_seconds

    def _next_to_start(self) -> list[JobWork]:
        room = StepRoom(
            map(_demand, self._running.values()),
            self._capacity.max_running_jobs,
            self._capacity.max_step_pixels,
            self._capacity.step_pixels_by_size,
        )
        may_start = claimable(
            self.waiting.values(), self._num_running, self._capacity.max_running_jobs_of_caller
        )
        started: list[JobWork] = []
        for number, work in enumerate(may_start):
            if number - len(started) == MAX_CONSIDERED_JOBS:
                break
            if room.take(work.demand, work.job_id in self._due):
                started.append(work)
        return started

    def _start(self, work: JobWork) -> None:
        request = work.running_request()
        self._running[work.job_id] = request
        self._num_running[work.caller] += 1
        (self._denoised if request.is_denoised else self._stepping)[work.job_id] = request

    def _start_decodes(self) -> None:
        num_undecoded = sum([len(request.undecoded) for request in self._denoised.values()])
        if len(self._decode_seconds) == min(num_undecoded, self._capacity.num_ranks):
            return
        decodes = next_decodes(self._denoised, free_ranks(self._denoised, self._capacity.num_ranks))
        note_decodes(self._denoised, decodes)
        for decode in decodes:
            size = self._denoised[decode.claim_id].size
            seconds = self._durations.image_seconds(size.width, size.height)
            self._decode_seconds[decode.claim_id, decode.image_index] = seconds

    def _take_steps(self, job_ids: tuple[str, ...]) -> float:
        """Have jobs take steps together, as often as the round is repeated and as each has steps left.

        Returns:
            How long the steps take.
        """
        if self._rotation.is_over(self._stepping):
            self._rotation = _Rotation(self._choose_repeats())
        max_forwards = self._rotation.num_repeats
        stepping = [self._stepping[job_id] for job_id in job_ids]
        step_seconds = self._step_seconds(stepping)
        self._rotation.add(job_ids, step_seconds)
        note_forward(self._stepping, job_ids, step_seconds)
        num_forwards = 1
        left = [request for request in stepping if not request.is_denoised]
        while left and num_forwards < max_forwards:
            num_steps = min(max_forwards - num_forwards, *map(_num_steps_left, left))
            step_seconds += num_steps * self._step_seconds(left)
            num_forwards += num_steps
            for request in left:
                request.step += num_steps
            left = [request for request in left if not request.is_denoised]
        if len(left) < len(stepping):
            self._has_room = True
            self._stepping = {job_id: r for job_id, r in self._stepping.items() if not r.is_denoised}
            # In the order of their start.
            self._denoised = {
                job_id: r for job_id, r in self._running.items() if job_id not in self._stepping
            }
        self._num_rounds += 1
        self.seconds += step_seconds + num_forwards * self._seconds_between_steps
        return step_seconds

    def _choose_repeats(self) -> int:
        """Choose how often the next rotation is repeated at once."""
        num_repeats = 1
        if self._rotation.is_like_the_next(self._stepping):
            num_repeats = min(map(_num_steps_left, self._stepping.values())) - 1
            if self._decode_seconds:
                seconds = min(self._decode_seconds.values())
                num_repeats = min(num_repeats, int(seconds / self._rotation.step_seconds))
        # The next rounds on their own: more often than once where this has grown to 2.
        return max(1, num_repeats, int(math.exp(self._coarseness * self._num_rounds - 1)))

    def _step_seconds(self, stepping: Sequence[RunningRequest]) -> float:
        width, height, prompt_tokens = stepping[0].size
        num_samples = sum([request.step_pixels for request in stepping]) // (width * height)
        return self._durations.step_seconds(width, height, num_samples, prompt_tokens)

    def _decode(self, budget_seconds: float) -> None:
        """Have each rank go on with its image, beside the steps at most as long as these take."""
        if not self._decode_seconds:
            return
        self.seconds += min(budget_seconds, max(self._decode_seconds.values()))
        for (job_id, image_index), seconds in tuple(self._decode_seconds.items()):
            if seconds > budget_seconds:
                self._decode_seconds[job_id, image_index] = seconds - budget_seconds
            else:
                del self._decode_seconds[job_id, image_index]
                self._running[job_id].finish_image(image_index)


class _Rotation:
    """The rounds in which every job that steps has its turn, or in which it has several.

    Attributes:
        num_repeats: how often each of its rounds is repeated at once.
        step_seconds: duration of its steps without repeats.
    """

    def __init__(self, num_repeats: int = 1) -> None:
        self.num_repeats = num_repeats
        self.step_seconds = 0.0
        self._job_ids: set[str] = set()
        self._num_turns = 0

    def add(self, job_ids: tuple[str, ...], step_seconds: float) -> None:
        """Record a round."""
        self._job_ids.update(job_ids)
        self._num_turns += len(job_ids)
        self.step_seconds += step_seconds

    def is_over(self, stepping: Mapping[str, RunningRequest]) -> bool:
        """Whether all of these have had their turn."""
        return self._job_ids >= stepping.keys()

    def is_like_the_next(self, stepping: Mapping[str, RunningRequest]) -> bool:
        """Whether the same jobs are to step again, each of which has had exactly one turn."""
        return self._num_turns == len(self._job_ids) and self._job_ids == stepping.keys()


def _ignore(_: EngineEvent) -> None:
    """Report nothing: the request is not a caller's."""


def _demand(running: RunningRequest) -> StepDemand:
    request = running.request
    return StepDemand(
        request.caller, request.priority, running.size, running.step_pixels, _num_steps_left(running)
    )


def _due_jobs(waiting: Sequence[JobWork]) -> frozenset[str]:
    """Find the jobs that have the turn of the oldest: they are in front of those of a higher priority."""
    due: set[str] = set()
    highest = Priority.LOW
    for work in reversed(waiting):
        if work.priority < highest:
            due.add(work.job_id)
        highest = max(highest, work.priority)
    return frozenset(due)


def _num_steps_left(request: RunningRequest) -> int:
    return request.request.parameters.num_inference_steps - request.step


def _with_later_jobs(
    durations: MeasuredDurations,
    waiting: Sequence[JobWork],
    starts: dict[str, float],
    ends: dict[str, float],
) -> Estimates:
    """Add the jobs behind those that were simulated: they start by the work in front of them.

    Each of them takes as much longer than alone as those in front.
    """
    if len(waiting) <= MAX_SIMULATED_JOBS:
        return Estimates(starts, ends)
    amounts = seconds_alone(durations, waiting)
    half = MAX_SIMULATED_JOBS // 2
    last_start = max(starts[work.job_id] for work in waiting[:MAX_SIMULATED_JOBS])
    middle_start = max(starts[work.job_id] for work in waiting[:half])
    in_front = waiting[half:MAX_SIMULATED_JOBS]
    together = sum(ends[work.job_id] - starts[work.job_id] for work in in_front)
    alone = sum(amounts[half:MAX_SIMULATED_JOBS])
    pace, slowdown = (last_start - middle_start) / alone, together / alone
    later = zip(waiting[MAX_SIMULATED_JOBS:], amounts[MAX_SIMULATED_JOBS:], strict=True)
    for (work, amount), work_in_front in zip(
        later, accumulate(amounts[MAX_SIMULATED_JOBS - 1 :]), strict=False
    ):
        start_seconds = last_start + pace * work_in_front
        starts[work.job_id] = start_seconds
        ends[work.job_id] = start_seconds + slowdown * amount
    return Estimates(starts, ends, pace, slowdown)


def seconds_alone(durations: MeasuredDurations, works: Sequence[JobWork]) -> list[float]:
    """How long each would take alone; most of many are alike."""
    known: dict[tuple[int, ...], float] = {}
    amounts = []
    for work in works:
        amount = known.get(work.shape)
        if amount is None:
            amount = known[work.shape] = work.seconds_alone(durations)
        amounts.append(amount)
    return amounts
