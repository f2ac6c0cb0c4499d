"""How often running requests hand up a snapshot. Pure: no clock, no process, no torch.

The first snapshot of a request is due after its first step, whatever was spent. After that a share of the
step time is spent, on the request that would lose most; one snapshot a plan at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hidream_grpc.engine.running_request import RunningRequest

MAX_SHARE = 0.01
"""Share of the time of steps that may be spent on snapshots."""

TRANSFER_BYTES_PER_SECOND = 500e6
"""From rank 0 to the server, both ends; measured on a loopback Unix socket."""


def next_snapshot(
    running: Mapping[str, RunningRequest], step_claims: Sequence[str], budget: SnapshotBudget
) -> str | None:
    """The request of a step that hands up a snapshot after it; None when none does."""
    due = [
        (not request.has_handed_up, request.unsaved_seconds, claim_id)
        for claim_id in step_claims
        if not (request := running[claim_id]).has_handed_up or budget.has_enough
    ]
    return max(due)[2] if due else None


def snapshot_cost_seconds(snapshot_seconds: float, size_bytes: int) -> float:
    """What a snapshot costs that took a rank this long to make, the way to the server included."""
    return snapshot_seconds + size_bytes / TRANSFER_BYTES_PER_SECOND


class SnapshotBudget:
    """The time that steps have earned and snapshots have not spent; below zero after first snapshots."""

    def __init__(self) -> None:
        self._seconds = 0.0
        # Cost of the latest snapshot.
        self._cost_seconds = 0.0

    @property
    def has_enough(self) -> bool:
        """Whether one more snapshot that costs as much as the latest one is paid for."""
        return self._seconds >= self._cost_seconds

    def earn(self, step_seconds: float) -> None:
        """Add the share of a step."""
        earned_seconds = MAX_SHARE * step_seconds
        # No more than a snapshot is saved up: a quiet hour must not pay for a burst.
        self._seconds = min(self._seconds + earned_seconds, max(self._cost_seconds, earned_seconds))

    def spend(self, cost_seconds: float) -> None:
        """Subtract the cost of a snapshot."""
        self._cost_seconds = cost_seconds
        self._seconds -= cost_seconds
