"""The order in which waiting jobs are claimed. Pure; `queries.next_job` says the same in SQL."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job that nobody has; the number grows with the time of its acceptance."""

    number: int
    job_id: str
    caller: str
    priority: int


def claim_order(waiting: Iterable[WaitingJob], last_turns: Mapping[str, int]) -> list[str]:
    """Jobs by priority; within it the caller whose last turn is longest ago gives its oldest job."""
    by_priority: dict[int, dict[str, deque[WaitingJob]]] = {}
    for job in sorted(waiting, key=lambda job: job.number):
        by_priority.setdefault(job.priority, {}).setdefault(job.caller, deque()).append(job)
    turns = dict(last_turns)
    next_turn = max(turns.values(), default=0) + 1
    ordered: list[str] = []
    for _, callers in sorted(by_priority.items(), reverse=True):
        heap = [(turns.get(caller, 0), jobs[0].number, caller) for caller, jobs in callers.items()]
        heapq.heapify(heap)
        while heap:
            caller = heapq.heappop(heap)[2]
            jobs = callers[caller]
            ordered.append(jobs.popleft().job_id)
            turns[caller] = next_turn
            if jobs:
                heapq.heappush(heap, (next_turn, jobs[0].number, caller))
            next_turn += 1
    return ordered
