"""In which order requests that run take their steps. Pure.

Within a priority callers take turns: the one whose latest step is longest ago comes first, with the request
that has waited longest. Before them goes what turns would make late, while it can still end before its
deadline. What is passed over for too long goes before all others, for one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.running_request import RunningRequest

MAX_TURNS_WAITED = 16
"""Forwards for which a request waits before it goes before those of another priority."""

URGENT_FACTOR = 3.0
"""A request is urgent once less than so many times the time of its remaining steps is left."""

StepKey = tuple[float, ...]
"""What requests are ordered by; the smallest goes first."""


def step_order(requests: Iterable[RunningRequest], now: float = 0.0) -> list[RunningRequest]:
    """Order requests for the next forward.

    1. Those that have waited for `MAX_TURNS_WAITED` forwards or more, longest waiting first. The first step
       of a request of HIGH priority counts as having waited for twice as many when it comes.
    2. By priority.
    3. Urgent ones that can still end before their deadlines, the earliest deadline first: with more left than
       `URGENT_FACTOR` says, taking turns is early enough.
    4. The one of each caller that has waited longest, then the second of each, and so on; among these the
       caller first whose latest step is longest ago.

    Args:
        requests: those that may take a step, in the order of their start, which decides between equals.
        now: on the clock of the requests' deadlines, in seconds.
    """
    requests = list(requests)
    known = [request.step_seconds for request in requests if request.step_seconds is not None]
    typical_seconds = median(known) if known else 0.0
    lines: dict[tuple[Priority, str], list[tuple[int, RunningRequest]]] = {}
    for number, request in enumerate(requests):
        line = lines.setdefault((request.request.priority, request.request.caller), [])
        line.append((number, request))
    keyed: list[tuple[StepKey, int, RunningRequest]] = []
    for line in lines.values():
        line.sort(key=lambda numbered: -numbered[1].turns_waited)
        caller_waited = line[-1][1].turns_waited
        for place, (number, request) in enumerate(line):
            urgency = _urgency(request, now, typical_seconds)
            keyed.append((_step_key(request, place, caller_waited, urgency), number, request))
    keyed.sort()
    return [request for *_, request in keyed]


def _urgency(request: RunningRequest, now: float, typical_seconds: float) -> float:
    """The deadline of an urgent request; infinite for one that is early enough, too late, or has none."""
    deadline = request.request.deadline
    if deadline is None:
        return math.inf
    num_steps = request.request.parameters.num_inference_steps - request.step
    seconds = num_steps * (typical_seconds if request.step_seconds is None else request.step_seconds)
    return deadline if seconds <= deadline - now < URGENT_FACTOR * seconds else math.inf


def _step_key(request: RunningRequest, place: int, caller_waited: float, urgency: float) -> StepKey:
    """The key of a request at a place in the line of its caller, whose latest step was some forwards ago."""
    priority, waited = request.request.priority, request.turns_waited
    if priority is Priority.HIGH and request.step_seconds is None:
        waited += 2 * MAX_TURNS_WAITED
    overdue = waited if waited >= MAX_TURNS_WAITED else -math.inf
    return -overdue, -priority, urgency, place, -caller_waited, -waited
