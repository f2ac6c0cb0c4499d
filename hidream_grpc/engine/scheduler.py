"""Plans a round: which requests take a step, and what else the ranks do. Pure: no clock, no process.

    schedule(running, ...)                        -> all that the ranks do in a round
    next_forward(requests, max_step_pixels, ...)  -> the requests that take the next step
    note_forward(running, claim_ids, seconds)        once they have taken it
    next_decodes(requests, free_ranks)            -> the images that free ranks begin
    note_decodes(running, decodes)                   once they have begun

All but the first serve made-up time too: estimates run them with durations instead of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from hidream_grpc.engine.admissions import next_admissions, next_releases
from hidream_grpc.engine.protocol.messages import Decode, StepPlan
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.snapshot_schedule import SnapshotBudget, next_snapshot
from hidream_grpc.engine.step_order import has_waited_longest, step_order
from hidream_grpc.engine.suspects import find_suspect
from hidream_grpc.model.parameters import SampleSize


class Forward(NamedTuple):
    """The requests of one forward of the transformer, in the order of `step_order`.

    Attributes:
        claim_ids: all of one size; empty when no step is due.
        is_full: whether requests of that size are left out for want of room.
    """

    claim_ids: tuple[str, ...]
    is_full: bool


@dataclass(frozen=True, slots=True)
class Round:
    """A plan, and what has to be known of it when its answers come or it is lost.

    Attributes:
        plan: the message to every rank.
        is_full: whether its step leaves out requests for want of room.
        at_work: progress of each request that the ranks do something for; one of these may be the culprit
            if the plan is lost.
    """

    plan: StepPlan
    is_full: bool
    at_work: Mapping[str, int]


def schedule(
    running: Mapping[str, RunningRequest],
    held: Collection[str],
    *,
    plan_id: int,
    world_size: int,
    max_step_pixels: int,
    step_pixels_by_size: Mapping[SampleSize, int],
    snapshot_budget: SnapshotBudget,
    latest_step_seconds: float | None,
    now: float,
) -> Round | None:
    """Choose what the ranks do next; None when that is nothing.

    Args:
        running: all requests, in the order of their start.
        held: claims that the ranks hold a state of.
        plan_id: number of the plan.
        world_size: ranks of the group.
        max_step_pixels: width × height × samples of one forward; a single request may exceed it.
        step_pixels_by_size: the same for forwards of these sizes, where it is less.
        snapshot_budget: the time that may be spent on snapshots.
        latest_step_seconds: duration of the latest step of any request; None before.
        now: on the clock of the requests' deadlines, in seconds.
    """
    suspect = find_suspect(running)
    admissions = next_admissions(running, suspect)
    releases = next_releases(running, held)
    started = {admission.claim_id for admission in admissions}
    ready = {
        claim_id: request
        for claim_id, request in running.items()
        if (request.is_admitted or claim_id in started) and suspect in (None, claim_id)
    }
    forward = next_forward(ready, max_step_pixels, step_pixels_by_size, now)
    decodes = next_decodes(ready, free_ranks(running, world_size))
    decoding = [claim_id for claim_id, request in running.items() if request.decoding]
    if not (forward.claim_ids or decodes or releases or admissions or decoding):
        return None
    plan = StepPlan(
        plan_id=plan_id,
        releases=releases,
        admissions=admissions,
        step_claims=forward.claim_ids,
        snapshot_claim=next_snapshot(running, forward.claim_ids, snapshot_budget),
        decodes=decodes,
        decode_budget_seconds=_decode_budget_seconds(running, forward, latest_step_seconds),
    )
    at_work = {*forward.claim_ids, *started, *decoding, *(decode.claim_id for decode in decodes)}
    return Round(plan, forward.is_full, {claim_id: running[claim_id].progress for claim_id in at_work})


def next_forward(
    requests: Mapping[str, RunningRequest],
    max_step_pixels: int,
    step_pixels_by_size: Mapping[SampleSize, int] = MappingProxyType({}),
    now: float = 0.0,
) -> Forward:
    """Choose the requests of the next forward.

    The first one in `step_order` decides the size; all others of that size join it, in this order, while the
    step has room. So sizes take turns as callers do.

    Args:
        requests: those that may take a step now, in the order of their start.
        max_step_pixels: width × height × samples of one forward; a single request may exceed it.
        step_pixels_by_size: the same for forwards of these sizes, where it is less.
        now: on the clock of the requests' deadlines, in seconds.
    """
    waiting = step_order([request for request in requests.values() if not request.is_denoised], now)
    if not waiting:
        return Forward((), is_full=False)
    size = waiting[0].size
    room_pixels = min(max_step_pixels, step_pixels_by_size.get(size, max_step_pixels))
    chosen: list[str] = []
    is_full = False
    for request in waiting:
        if request.size != size:
            continue
        if chosen and request.step_pixels > room_pixels:
            is_full = True
            continue
        chosen.append(request.request.claim_id)
        room_pixels -= request.step_pixels
    return Forward(tuple(chosen), is_full)


def note_forward(
    running: Mapping[str, RunningRequest], claim_ids: Sequence[str], step_seconds: float
) -> None:
    """Record a forward: these requests have taken a step in it, all others have waited for one more.

    Args:
        running: all requests, in the order of their start.
        claim_ids: in the order of the forward.
        step_seconds: duration of the step.
    """
    leader = running.get(claim_ids[0]) if claim_ids else None
    was_oldest = leader is not None and has_waited_longest(leader, running.values())
    stepping = frozenset(claim_ids)
    stepped = {running[claim_id].line for claim_id in claim_ids if claim_id in running}
    for claim_id, request in running.items():
        request.turns_in_order = 0 if was_oldest else request.turns_in_order + 1
        request.caller_turns_waited = 0 if request.line in stepped else request.caller_turns_waited + 1
        if claim_id in stepping:
            request.take_step(step_seconds)
        else:
            request.turns_waited += 1


def free_ranks(running: Mapping[str, RunningRequest], world_size: int) -> tuple[int, ...]:
    """The ranks that are decoding no image."""
    busy = {rank for request in running.values() for rank in request.decoding.values()}
    return tuple(rank for rank in range(world_size) if rank not in busy)


def next_decodes(requests: Mapping[str, RunningRequest], ranks: Iterable[int]) -> tuple[Decode, ...]:
    """Choose an image for each of these ranks, oldest request first.

    Args:
        requests: those whose images may be decoded now, in the order of their start.
        ranks: those that are decoding none, see `free_ranks`.
    """
    waiting = (
        (claim_id, image_index)
        for claim_id, request in requests.items()
        if request.is_denoised
        for image_index in sorted(request.undecoded - request.decoding.keys())
    )
    return tuple(
        Decode(claim_id=claim_id, image_index=image_index, rank=rank)
        for rank, (claim_id, image_index) in zip(ranks, waiting, strict=False)
    )


def note_decodes(running: Mapping[str, RunningRequest], decodes: Iterable[Decode]) -> None:
    """Record that these ranks have begun these images, which may take several rounds."""
    for decode in decodes:
        if request := running.get(decode.claim_id):
            request.decoding[decode.image_index] = decode.rank


def step_pixels(running: Mapping[str, RunningRequest], claim_ids: Iterable[str]) -> int:
    """Width × height × samples of a forward of these requests; those that have left count as none."""
    return sum(running[claim_id].step_pixels for claim_id in claim_ids if claim_id in running)


def _decode_budget_seconds(
    running: Mapping[str, RunningRequest], forward: Forward, latest_step_seconds: float | None
) -> float | None:
    """One step time of those that step, so that a decode at most doubles their wait, but for a slice.

    A round without a step has a budget too: a request may arrive meanwhile.
    """
    known = (running[claim_id].step_seconds for claim_id in forward.claim_ids)
    return min((seconds for seconds in known if seconds is not None), default=latest_step_seconds)
