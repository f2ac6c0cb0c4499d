"""The order in which waiting jobs are claimed, which also gives their queue positions. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol, TypeVar


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that no replica has; its number grows with the time of acceptance.

    Attributes:
        was_begun: whether it lost the replica that ran it: it has had its turn.
    """

    acceptance_number: int
    job_id: str
    caller: str
    priority: int
    was_begun: bool = False


class _OfCaller(Protocol):
    @property
    def caller(self) -> str: ...


_JobOfCaller = TypeVar("_JobOfCaller", bound=_OfCaller)


@dataclass(frozen=True, slots=True)
class CallerLoads:
    """The turns and running jobs of callers when an order is made.

    Attributes:
        last_turns: when each caller last had a turn; grows from turn to turn, over all callers.
        num_running: how many jobs of each caller replicas have now.
        max_running_jobs: how many jobs of one caller may run; None for any number.
    """

    last_turns: Mapping[str, int] = field(default_factory=dict)
    num_running: Mapping[str, int] = field(default_factory=dict)
    max_running_jobs: int | None = None


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """Waiting jobs in order.

    Attributes:
        claimable: those that may be claimed now, the next one first.
        held_back: those behind them, whose callers then run as many jobs as they may.
    """

    claimable: tuple[WaitingJob, ...]
    held_back: tuple[WaitingJob, ...]

    def __iter__(self) -> Iterator[WaitingJob]:
        yield from self.claimable
        yield from self.held_back


def claim_order(waiting: Iterable[WaitingJob], loads: CallerLoads) -> ClaimOrder:
    """Order jobs: begun ones first, then by priority; within it callers take turns.

    The caller whose last turn is longest ago gives its oldest job.
    """
    jobs = tuple(TurnOrder(waiting, loads.last_turns))
    if loads.max_running_jobs is None:
        return ClaimOrder(jobs, ())
    first = tuple(claimable(jobs, loads.num_running, loads.max_running_jobs))
    first_ids = {job.job_id for job in first}
    return ClaimOrder(first, tuple(job for job in jobs if job.job_id not in first_ids))


def claimable(
    jobs: Iterable[_JobOfCaller], num_running: Mapping[str, int], max_running_jobs: int | None
) -> Iterator[_JobOfCaller]:
    """Choose the jobs that may be claimed one after another; one whose caller has enough is passed over.

    Args:
        jobs: in order.
        num_running: jobs of each caller that run before the first of these.
        max_running_jobs: jobs of one caller that may run; None for any number.
    """
    if max_running_jobs is None:
        yield from jobs
        return
    num_of_caller = Counter(num_running)
    for job in jobs:
        if num_of_caller[job.caller] < max_running_jobs:
            num_of_caller[job.caller] += 1
            yield job


class TurnOrder:
    """Jobs in order: begun ones first, then by priority; within it callers take turns.

    The newest job takes its place without another look at those before it.
    """

    def __init__(self, waiting: Iterable[WaitingJob], last_turns: Mapping[str, int]) -> None:
        """Take jobs in any order, and when each caller last had a turn."""
        self._last_turns = last_turns
        self._begun: list[WaitingJob] = []
        self._by_priority: dict[int, list[WaitingJob]] = {}
        self._rounds: dict[int, _Rounds] = {}
        for job in sorted(waiting, key=lambda job: job.acceptance_number):
            jobs = self._begun if job.was_begun else self._by_priority.setdefault(job.priority, [])
            jobs.append(job)

    def __iter__(self) -> Iterator[WaitingJob]:
        yield from self._begun
        for priority in sorted(self._by_priority, reverse=True):
            yield from self._rounds_of(priority)

    def add_newest(self, job: WaitingJob) -> int:
        """Add a job that was accepted after all others and not begun; return how many come before it."""
        jobs = self._by_priority.setdefault(job.priority, [])
        jobs.append(job)
        # With this job its caller has another last turn before those of lower priorities.
        self._rounds = {priority: r for priority, r in self._rounds.items() if priority >= job.priority}
        if rounds := self._rounds.get(job.priority):
            num_before = rounds.add(job)
        else:
            num_before = next(n for n, other in enumerate(self._rounds_of(job.priority)) if other is job)
        num_higher = sum(len(jobs) for priority, jobs in self._by_priority.items() if priority > job.priority)
        return len(self._begun) + num_higher + num_before

    def _rounds_of(self, priority: int) -> _Rounds:
        """The rounds of a priority, which begin with the turns that the higher ones end with."""
        if priority not in self._rounds:
            higher = min((other for other in self._by_priority if other > priority), default=None)
            turns = self._last_turns if higher is None else self._rounds_of(higher).turns_after()
            self._rounds[priority] = _Rounds(self._by_priority[priority], turns)
        return self._rounds[priority]


class _Rounds:
    """Jobs of one priority: in each round every caller gives its oldest job.

    In all rounds the callers come in the order of the first: whose last turn is longest ago, and of those
    that had none, whose job is oldest.

    Args:
        jobs: in the order of their acceptance.
        turns: when each caller last had a turn before.
    """

    def __init__(self, jobs: Iterable[WaitingJob], turns: Mapping[str, int]) -> None:
        self._turns = turns
        self._rounds: list[list[WaitingJob]] = []
        self._num_jobs: dict[str, int] = {}
        self._places: dict[str, tuple[int, int]] = {}
        for job in jobs:
            self._round_of(job).append(job)
        for round_ in self._rounds:
            round_.sort(key=self._place)

    def __iter__(self) -> Iterator[WaitingJob]:
        return chain.from_iterable(self._rounds)

    def add(self, job: WaitingJob) -> int:
        """Add a job that was accepted after all others; return how many come before it."""
        round_ = self._round_of(job)
        place = bisect_left(round_, self._place(job), key=self._place)
        round_.insert(place, job)
        num_rounds_before = self._num_jobs[job.caller] - 1
        return sum(map(len, self._rounds[:num_rounds_before])) + place

    def turns_after(self) -> Mapping[str, int]:
        """When each caller last had a turn once all of these have had theirs."""
        first_turn = max(self._turns.values(), default=0) + 1
        return {**self._turns, **{job.caller: turn for turn, job in enumerate(self, start=first_turn)}}

    def _round_of(self, job: WaitingJob) -> list[WaitingJob]:
        """The round in which a job that is the newest of its caller has its turn."""
        caller = job.caller
        num_before = self._num_jobs.get(caller, 0)
        self._num_jobs[caller] = num_before + 1
        if not num_before:
            self._places[caller] = (self._turns.get(caller, 0), job.acceptance_number)
        if num_before == len(self._rounds):
            self._rounds.append([])
        return self._rounds[num_before]

    def _place(self, job: WaitingJob) -> tuple[int, int]:
        return self._places[job.caller]
