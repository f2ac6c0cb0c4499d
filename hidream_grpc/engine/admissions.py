"""Which requests the ranks must start, and which they must forget. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hidream_grpc.engine.protocol.messages import Admission, StepPlan
from hidream_grpc.engine.running_request import RunningRequest

MAX_ADMITTED_SNAPSHOT_BYTES = 64 * 1024 * 1024
"""Snapshots in one plan, far below what a frame may hold; the others come with the next plan."""


def next_admissions(
    running: Mapping[str, RunningRequest], suspect: str | None = None
) -> tuple[Admission, ...]:
    """The requests that the ranks start with the next plan.

    Args:
        running: all requests, in the order of their start.
        suspect: the only one that may be started now; None for all.
    """
    admissions: list[Admission] = []
    room_bytes = MAX_ADMITTED_SNAPSHOT_BYTES
    for claim_id, request in running.items():
        if request.is_admitted or suspect not in (None, claim_id):
            continue
        admission = request.admission()
        room_bytes -= len(admission.snapshot)
        if admissions and room_bytes < 0:
            break
        admissions.append(admission)
    return tuple(admissions)


def next_releases(running: Mapping[str, RunningRequest], held: Collection[str]) -> tuple[str, ...]:
    """The requests that the ranks forget before the next plan: what runs no more, and what starts again.

    The latter at once, even where it starts later: its images keep ranks busy that count as free.
    """
    return tuple(
        sorted(claim_id for claim_id in held if claim_id not in running or not running[claim_id].is_admitted)
    )


def note_admissions(running: Mapping[str, RunningRequest], admissions: tuple[Admission, ...]) -> None:
    """Record that the ranks have started these requests."""
    for admission in admissions:
        if request := running.get(admission.claim_id):
            request.is_admitted = True


def held_after(held: Collection[str], plan: StepPlan) -> frozenset[str]:
    """The claims that the ranks hold a state of once they have done a plan."""
    return frozenset(held) - set(plan.releases) | {admission.claim_id for admission in plan.admissions}
