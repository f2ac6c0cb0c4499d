"""The order in which waiting jobs are claimed, which also gives their queue positions. Pure."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field


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
    jobs = sorted(waiting, key=lambda job: job.acceptance_number)
    num_running = Counter(loads.num_running)
    limit = loads.max_running_jobs
    claimable: list[WaitingJob] = []
    held_back: list[WaitingJob] = []
    for job in _in_turns(jobs, loads.last_turns):
        if limit is not None and num_running[job.caller] >= limit:
            held_back.append(job)
        else:
            claimable.append(job)
            num_running[job.caller] += 1
    return ClaimOrder(tuple(claimable), tuple(held_back))


def _in_turns(jobs: Iterable[WaitingJob], last_turns: Mapping[str, int]) -> Iterator[WaitingJob]:
    by_priority: dict[int, dict[str, deque[WaitingJob]]] = {}
    for job in jobs:
        if job.was_begun:
            yield job
        else:
            by_priority.setdefault(job.priority, {}).setdefault(job.caller, deque()).append(job)
    turns = dict(last_turns)
    next_turn = max(turns.values(), default=0) + 1
    for _, callers in sorted(by_priority.items(), reverse=True):
        heap = [
            (turns.get(caller, 0), of_caller[0].acceptance_number, caller)
            for caller, of_caller in callers.items()
        ]
        heapq.heapify(heap)
        while heap:
            caller = heapq.heappop(heap)[2]
            of_caller = callers[caller]
            yield of_caller.popleft()
            turns[caller] = next_turn
            if of_caller:
                heapq.heappush(heap, (next_turn, of_caller[0].acceptance_number, caller))
            next_turn += 1
