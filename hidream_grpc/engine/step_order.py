"""In which order requests that run take their steps. Pure.

Within a priority callers take turns: the one whose latest step is longest ago comes first, with the request
that has waited longest. What is passed over for too long goes before all others, for one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.running_request import RunningRequest

MAX_TURNS_WAITED = 16
"""Forwards for which a request waits before it goes before those of another priority."""

StepKey = tuple[float, ...]
"""What requests are ordered by; the smallest goes first."""


def step_order(requests: Iterable[RunningRequest]) -> list[RunningRequest]:
    """Order requests for the next forward.

    1. Those that have waited for `MAX_TURNS_WAITED` forwards or more, longest waiting first. The first step
       of a request of HIGH priority counts as having waited for twice as many when it comes.
    2. By priority.
    3. The one of each caller that has waited longest, then the second of each, and so on; among these the
       caller first whose latest step is longest ago.

    Args:
        requests: those that may take a step, in the order of their start, which decides between equals.
    """
    lines: dict[tuple[Priority, str], list[tuple[int, RunningRequest]]] = {}
    for number, request in enumerate(requests):
        line = lines.setdefault((request.request.priority, request.request.caller), [])
        line.append((number, request))
    keyed: list[tuple[StepKey, int, RunningRequest]] = []
    for line in lines.values():
        line.sort(key=lambda numbered: -numbered[1].turns_waited)
        caller_waited = line[-1][1].turns_waited
        for place, (number, request) in enumerate(line):
            keyed.append((_step_key(request, place, caller_waited), number, request))
    keyed.sort()
    return [request for *_, request in keyed]


def _step_key(request: RunningRequest, place: int, caller_waited: float) -> StepKey:
    """The key of a request at a place in the line of its caller, whose latest step was some forwards ago."""
    priority, waited = request.request.priority, request.turns_waited
    if priority is Priority.HIGH and request.step_seconds is None:
        waited += 2 * MAX_TURNS_WAITED
    overdue = waited if waited >= MAX_TURNS_WAITED else -math.inf
    return -overdue, -priority, place, -caller_waited, -waited
