"""Which waiting jobs start beside those that run: those that the next round of steps serves. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Self

from hidream_grpc.engine.requests import Priority
from hidream_grpc.jobs.job import Job
from hidream_grpc.model.parameters import GenerationParameters, SampleSize

MAX_CONSIDERED_JOBS = 16
"""Number of waiting jobs, the next ones first, among which those are found that start."""
SHORT = 1 / 2
"""A job is short beside another one if it takes at most this share of what is left of that one."""
FULL_FORWARD = 1 - 1e-9
"""Shares of a forward that fill it: their sums are not exact."""


class StepDemand(NamedTuple):
    """What a job asks of the engine's steps.

    Attributes:
        size: only jobs of one size share a forward.
        step_pixels: width × height × samples, which it adds to a forward.
        num_steps: denoising steps that it has yet to take; 0 once its images are only to be decoded.
    """

    caller: str
    priority: Priority
    size: SampleSize
    step_pixels: int
    num_steps: int

    @classmethod
    def of(cls, caller: str, priority: Priority, parameters: GenerationParameters, step: int) -> Self:
        """The demand of a job that has taken some steps."""
        return cls(
            caller,
            priority,
            parameters.sample_size,
            parameters.width * parameters.height * parameters.num_samples,
            parameters.num_inference_steps - step,
        )

    @classmethod
    def of_waiting(cls, job: Job) -> Self:
        """The demand of a job that no replica runs: it goes on from its snapshot, where there is one."""
        step = 0 if job.snapshot is None else job.snapshot.step
        submission = job.submission
        return cls.of(submission.caller, submission.priority, submission.parameters, step)

    @property
    def work(self) -> int:
        """Pixels of all steps that are left."""
        return self.step_pixels * self.num_steps


class _Served(NamedTuple):
    """A job that steps, or waits for its steps before others.

    Attributes:
        place: how many jobs of its caller and priority are before it.
        forwards: its share of a forward of its size.
    """

    place: int
    work: int
    size: SampleSize
    step_pixels: int
    forwards: float


class _Tier:
    """The jobs of one priority.

    Attributes:
        num_running: how many of them run.
        served: those that step, or wait for their steps before others.
        forwards: the sum of these.
        pixels: the sum of these by size.
        lines: the work of each of these by caller, the least first.
    """

    def __init__(self) -> None:
        self.num_running = 0
        self.served: list[_Served] = []
        self.forwards = 0.0
        self.pixels: defaultdict[SampleSize, int] = defaultdict(int)
        self.lines: defaultdict[str, list[int]] = defaultdict(list)

    def serve(self, demand: StepDemand, max_step_pixels: int) -> None:
        """Add a job, if it has steps left."""
        caller, _, size, step_pixels, num_steps = demand
        if num_steps > 0:
            line, work, forwards = self.lines[caller], demand.work, step_pixels / max_step_pixels
            self.served.append(_Served(len(line), work, size, step_pixels, forwards))
            self.forwards += forwards
            self.pixels[size] += step_pixels
            insort(line, work)


class StepRoom:
    """The running jobs of an engine, and how many more it should start.

    A job starts if a forward of its size has room for it beside those of this size that go before it, and
    all that go before it, each by its share of a forward of its own size, fill less than one. So what is
    alike runs one group after another, and the budget of a step decides how many jobs run. Before a job go
    those that run already, unless

    - its priority is higher, or
    - they are further down in the line of their caller than it is in that of its own, or
    - they are as far down, and it is short beside them.

    Those that it displaces in this way keep their state, and take turns with it.

    Args:
        running: in the order of their start.
        max_running_jobs: jobs of a priority or a higher one that may run at the same time.
        max_step_pixels: width × height × samples of one forward; a single job may exceed it.
        step_pixels_by_size: the same for forwards of these sizes, where it is less.

    Attributes:
        refused_sizes: sizes of the jobs that would have started if a step held more.
    """

    def __init__(
        self,
        running: Iterable[StepDemand],
        max_running_jobs: int,
        max_step_pixels: int,
        step_pixels_by_size: Mapping[SampleSize, int] = MappingProxyType({}),
    ) -> None:
        self.refused_sizes: set[SampleSize] = set()
        self._max_running_jobs = max_running_jobs
        self._max_step_pixels = max_step_pixels
        self._step_pixels_by_size = step_pixels_by_size
        self._tiers: defaultdict[Priority, _Tier] = defaultdict(_Tier)
        for demand in running:
            tier = self._tiers[demand.priority]
            tier.num_running += 1
            tier.serve(demand, self._step_pixels(demand.size))

    def take(self, demand: StepDemand, is_due: bool = False) -> bool:
        """Decide whether the next one of those that wait starts; one that does not stays before the others.

        Args:
            is_due: whether it starts though the steps have no room, since so many others started before it.
        """
        tier, max_step_pixels = self._tiers[demand.priority], self._step_pixels(demand.size)
        starts = False
        if self.may_run(demand.priority):
            starts = is_due or self._is_served_soon(demand, max_step_pixels)
            if starts:
                tier.num_running += 1
            else:
                self.refused_sizes.add(demand.size)
        tier.serve(demand, max_step_pixels)
        return starts

    def may_run(self, priority: int) -> bool:
        """Whether fewer jobs of a priority or a higher one run than may, whatever the steps have room for."""
        num_running = 0
        for other, tier in self._tiers.items():
            if other >= priority:
                num_running += tier.num_running
        return num_running < self._max_running_jobs

    def _is_served_soon(self, demand: StepDemand, max_step_pixels: int) -> bool:
        caller, own_priority, own_size, own_pixels, _ = demand
        # Beside jobs of this work or more it is short.
        long_work = demand.work / SHORT
        own_tier = self._tiers[own_priority]
        # In its line it is behind those beside which it is not short.
        own_place = bisect_left(own_tier.lines[caller], long_work)
        forwards, pixels_of_size = 0.0, own_pixels
        for priority, tier in self._tiers.items():
            if priority > own_priority:
                forwards += tier.forwards
                pixels_of_size += tier.pixels[own_size]
        if forwards >= FULL_FORWARD or pixels_of_size > max(own_pixels, max_step_pixels):
            return False
        for place, work, size, step_pixels, share in own_tier.served:
            if place < own_place or (place == own_place and work < long_work):
                forwards += share
                if size == own_size:
                    pixels_of_size += step_pixels
                    if pixels_of_size > max_step_pixels:
                        return False
                if forwards >= FULL_FORWARD:
                    return False
        return True

    def _step_pixels(self, size: SampleSize) -> int:
        return min(self._max_step_pixels, self._step_pixels_by_size.get(size, self._max_step_pixels))
