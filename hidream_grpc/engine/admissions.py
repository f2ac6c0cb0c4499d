"""Which requests the ranks hold a state of, and which they must still start. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from hidream_grpc.engine.protocol.messages import Admission, StepPlan
from hidream_grpc.engine.running_request import RunningRequest

MAX_ADMITTED_SNAPSHOT_BYTES = 64 * 1024 * 1024
"""Of one plan, far below what a frame may hold; the others' turn comes with the next plan."""


class Admissions:
    """The difference between the requests that run and those that the ranks know."""

    def __init__(self) -> None:
        # In the order in which they were asked for; from their snapshot or their seed.
        self._waiting: list[str] = []
        # Every one that was in a plan and not yet released.
        self._held: set[str] = set()

    def ask(self, claim_id: str) -> None:
        """Have the ranks start a request, again if they hold it."""
        self._waiting.append(claim_id)

    def forget_all(self) -> None:
        """Note that the ranks hold nothing any more, and wait for nothing."""
        self._waiting.clear()
        self._held.clear()

    def take(self, running: Mapping[str, RunningRequest], suspect: str | None) -> tuple[Admission, ...]:
        """The requests that are started in the next plan.

        Args:
            running: all that run; who is not among them is not started any more.
            suspect: the only one that may be started now; None for all.
        """
        self._waiting = [claim_id for claim_id in self._waiting if claim_id in running]
        admissions: list[Admission] = []
        room_bytes = MAX_ADMITTED_SNAPSHOT_BYTES
        for claim_id in [j for j in self._waiting if suspect in (None, j)]:
            admission = running[claim_id].admission()
            room_bytes -= len(admission.snapshot)
            if admissions and room_bytes < 0:
                break
            admissions.append(admission)
            self._waiting.remove(claim_id)
        return tuple(admissions)

    def releases(
        self, running: Mapping[str, RunningRequest], admissions: tuple[Admission, ...]
    ) -> tuple[str, ...]:
        """What the ranks must forget in a plan: what runs no more, and what they start again."""
        started = {admission.claim_id for admission in admissions}
        return tuple(claim_id for claim_id in self._held if claim_id not in running or claim_id in started)

    def ready(self, admissions: tuple[Admission, ...]) -> set[str]:
        """The requests that the ranks can work at in a plan with these admissions."""
        return (self._held | {admission.claim_id for admission in admissions}) - set(self._waiting)

    def planned(self, plan: StepPlan) -> None:
        """Note that the ranks get this plan."""
        self._held |= {admission.claim_id for admission in plan.admissions}

    def done(self, plan: StepPlan) -> None:
        """Note that the ranks have done this plan."""
        self._held -= set(plan.releases) - {admission.claim_id for admission in plan.admissions}
