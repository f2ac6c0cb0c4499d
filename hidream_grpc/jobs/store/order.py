"""The order in which waiting jobs are claimed, which also gives their queue positions. Pure."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


TURNS_PER_OLDEST = 17
"""Number of jobs that start one after another of which one is that which has waited longest of all."""

_JobOfCaller = TypeVar("_JobOfCaller", bound=_OfCaller)


@dataclass(frozen=True, slots=True)
class CallerLoads:
    """The turns and running jobs of callers when an order is made.

    Attributes:
        last_turns: when each caller last had a turn; grows from turn to turn, over all callers.
        num_running: how many jobs of each caller replicas have now.
        max_running_jobs: how many jobs of one caller may run; None for any number.
        newest_start: acceptance number of the newest job of the model that a replica has taken; 0 for none.
    """

    last_turns: Mapping[str, int] = field(default_factory=dict)
    num_running: Mapping[str, int] = field(default_factory=dict)
    max_running_jobs: int | None = None
    newest_start: int = 0

    @property
    def next_turn(self) -> int:
        """Number of the turn that comes next."""
        return max(self.last_turns.values(), default=0) + 1


@dataclass(frozen=True, slots=True)
class ClaimOrder:
    """Waiting jobs in order.

    Attributes:
        claimable: those that may be claimed now, the next one first.
        held_back: those behind them, whose callers then run as many jobs as they may.
        due: job ids of those that have the place of the oldest, which start whatever the steps hold.
        next_turn: number of the turn that the next start is, over all callers.
    """

    claimable: tuple[WaitingJob, ...]
    held_back: tuple[WaitingJob, ...]
    due: frozenset[str] = frozenset()
    next_turn: int = 1

    def __iter__(self) -> Iterator[WaitingJob]:
        yield from self.claimable
        yield from self.held_back


def claim_order(waiting: Iterable[WaitingJob], loads: CallerLoads) -> ClaimOrder:
    """Order jobs: begun ones first, then by priority; within it callers take turns.

    The caller whose last turn is longest ago gives its oldest job. Every turn whose number is a multiple of
    `TURNS_PER_OLDEST` is the oldest job's, whatever its priority and caller, where a later one has started
    before it. So at most `TURNS_PER_OLDEST` later jobs start before a job, for itself and for each older one
    that waits.
    """
    turns = tuple(_in_turns(sorted(waiting, key=lambda job: job.acceptance_number), loads))
    jobs = tuple(job for job, _ in turns)
    first = tuple(claimable(jobs, loads.num_running, loads.max_running_jobs))
    first_ids = {job.job_id for job in first}
    return ClaimOrder(
        first,
        tuple(job for job in jobs if job.job_id not in first_ids),
        frozenset(job.job_id for job, is_due in turns if is_due),
        loads.next_turn,
    )


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


def _in_turns(jobs: Iterable[WaitingJob], loads: CallerLoads) -> Iterator[tuple[WaitingJob, bool]]:
    """Jobs in the order of their turns, and whether each has that of the oldest.

    Args:
        jobs: by age.
        loads: when the order is made.
    """
    by_age: deque[WaitingJob] = deque()
    by_priority: dict[int, dict[str, deque[WaitingJob]]] = {}
    for job in jobs:
        if job.was_begun:
            yield job, False
        else:
            by_age.append(job)
            by_priority.setdefault(job.priority, {}).setdefault(job.caller, deque()).append(job)
    turns = dict(loads.last_turns)
    next_turn = loads.next_turn
    newest_start = loads.newest_start
    gone: set[str] = set()
    for _, callers in sorted(by_priority.items(), reverse=True):
        heap = [
            (turns.get(caller, 0), of_caller[0].acceptance_number, caller)
            for caller, of_caller in callers.items()
            if of_caller
        ]
        heapq.heapify(heap)
        while heap:
            while by_age and by_age[0].job_id in gone:
                by_age.popleft()
            is_overtaken = bool(by_age) and by_age[0].acceptance_number < newest_start
            is_due = is_overtaken and next_turn % TURNS_PER_OLDEST == 0
            if is_due:
                job = by_age[0]
            else:
                turn, number, caller = heapq.heappop(heap)
                line = callers[caller]
                if not line:
                    continue
                if (turns.get(caller, 0), line[0].acceptance_number) != (turn, number):
                    # It had the turn of the oldest meanwhile.
                    heapq.heappush(heap, (turns.get(caller, 0), line[0].acceptance_number, caller))
                    continue
                job = line[0]
            # The oldest of all is the oldest of its caller, too.
            line = by_priority[job.priority][job.caller]
            line.popleft()
            gone.add(job.job_id)
            newest_start = max(newest_start, job.acceptance_number)
            turns[job.caller] = next_turn
            if line and not is_due:
                heapq.heappush(heap, (next_turn, line[0].acceptance_number, job.caller))
            next_turn += 1
            yield job, is_due


def num_before_newest(
    order: Sequence[WaitingJob],
    job: WaitingJob,
    last_turns: Mapping[str, int],
    due: Collection[str] = (),
) -> int:
    """Count the jobs of an order that come before one which was accepted after all of them.

    It is as `claim_order` would place it, without making the order anew; callers may run any number of jobs.

    Args:
        order: of `claim_order`.
        job: was not begun.
        last_turns: those that the order was made with.
        due: ids of the jobs whose turns do not depend on their callers and priorities.
    """
    turns = dict(last_turns)
    next_turn = max(turns.values(), default=0) + 1
    line = (
        number
        for number, other in zip(range(len(order) - 1, -1, -1), reversed(order), strict=True)
        if other.caller == job.caller and other.priority >= job.priority
    )
    # Its caller gives its older jobs first.
    last_in_front = next(line, -1)
    if last_in_front == len(order) - 1:
        return len(order)
    for number, other in enumerate(order):
        if other.was_begun:
            continue
        if number > last_in_front and other.priority <= job.priority and other.job_id not in due:
            turn, own_turn = turns.get(other.caller, 0), turns.get(job.caller, 0)
            if other.priority < job.priority or turn > own_turn:
                return number
        turns[other.caller] = next_turn
        next_turn += 1
    return len(order)
