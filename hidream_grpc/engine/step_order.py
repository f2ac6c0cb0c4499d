"""In which order requests that run take their steps. Pure.

Within a priority callers take turns: the one whose latest step is longest ago comes first, with the request
that has waited longest. Before them goes what turns would make late, while it can still end before its
deadline. Now and then a forward is led by what has waited longest of all: nothing waits for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from statistics import median

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.running_request import RunningRequest

MAX_TURNS_WAITED = 16
"""Forwards in the order of priorities and callers before one that the longest waiting request leads."""
MAX_TURNS_DEFERRED = 2 * MAX_TURNS_WAITED
"""Forwards after which that request goes even before the first step of one of HIGH priority."""

URGENT_FACTOR = 3.0
"""A request is urgent once less than so many times the time of its remaining steps is left."""

ORDINARY = 3
"""The class of a request that does not go before the order of priorities."""


def step_order(requests: Sequence[RunningRequest], now: float = 0.0) -> list[RunningRequest]:
    """Order requests for the next forward.

    1. The first steps of requests of HIGH priority.
    2. The one that has waited longest, if that is for `MAX_TURNS_WAITED` forwards or more, and none of these
       went to such a one. It goes before all others once both are `MAX_TURNS_DEFERRED` or more.
    3. By priority.
    4. Urgent ones that can still end before their deadlines, the earliest deadline first: with more left than
       `URGENT_FACTOR` says, taking turns is early enough.
    5. The one of each caller that has waited longest, then the second of each, and so on; among these the
       caller first whose latest step is longest ago.

    So beside n requests one takes a step in any (n + 1) × (`MAX_TURNS_WAITED` + 1) forwards in a row, and in
    any (n + 1) × (`MAX_TURNS_DEFERRED` + 1) where first steps of HIGH priority keep coming. Those of a higher
    priority, and each caller beside equal ones, lose at most one forward in `MAX_TURNS_WAITED` + 1.

    Args:
        requests: those that may take a step, in the order of their start, which decides between equals.
        now: on the clock of the requests' deadlines, in seconds.
    """
    lines: dict[tuple[Priority, str], list[tuple[float, int, RunningRequest]]] = {}
    has_deadlines = False
    for number, request in enumerate(requests):
        lines.setdefault(request.line, []).append((-request.turns_waited, number, request))
        has_deadlines |= request.request.deadline is not None
    oldest = max(requests, key=attrgetter("turns_waited"), default=None)
    # The first ones to start have seen the most forwards.
    turns_in_order = requests[0].turns_in_order if requests else 0
    known = [r.step_seconds for r in requests if r.step_seconds is not None] if has_deadlines else []
    typical_seconds = median(known) if known else 0.0
    keyed = []
    for (priority, _), line in lines.items():
        caller_turns = -line[0][2].caller_turns_waited
        line.sort()
        for place, (turns, number, request) in enumerate(line):
            may_lead = request is oldest or priority is Priority.HIGH
            class_ = _class(request, turns_in_order if request is oldest else 0) if may_lead else ORDINARY
            urgency = _urgency(request, now, typical_seconds) if has_deadlines else math.inf
            keyed.append((class_, -priority, urgency, place, caller_turns, turns, number, request))
    keyed.sort()
    return [entry[-1] for entry in keyed]


def has_waited_longest(request: RunningRequest, requests: Iterable[RunningRequest]) -> bool:
    """Whether it has waited for `MAX_TURNS_WAITED` or more, and none of these with steps left for more."""
    return request.turns_waited >= MAX_TURNS_WAITED and all(
        other.turns_waited <= request.turns_waited or other.is_denoised for other in requests
    )


def _class(request: RunningRequest, turns_passed_over: int) -> int:
    """What comes before priorities; the smallest goes first.

    Args:
        turns_passed_over: forwards in which the oldest one did not go first; 0 for all but this one.
    """
    turns = min(request.turns_waited, turns_passed_over)
    if turns >= MAX_TURNS_DEFERRED:
        return 0
    if request.request.priority is Priority.HIGH and request.step_seconds is None:
        return 1
    return 2 if turns >= MAX_TURNS_WAITED else ORDINARY


def _urgency(request: RunningRequest, now: float, typical_seconds: float) -> float:
    """The deadline of an urgent request; infinite for one that is early enough, too late, or has none."""
    deadline = request.request.deadline
    if deadline is None:
        return math.inf
    num_steps = request.request.parameters.num_inference_steps - request.step
    seconds = num_steps * (typical_seconds if request.step_seconds is None else request.step_seconds)
    return deadline if seconds <= deadline - now < URGENT_FACTOR * seconds else math.inf
