"""How often running requests hand up a snapshot. Pure: no clock, no process, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_SHARE = 0.01
"""Of the time that steps take."""

TRANSFER_BYTES_PER_SECOND = 500e6
"""From rank 0 to the server, both ends; measured on a loopback Unix socket."""


@dataclass(slots=True)
class _Lost:
    """What losing the whole group now would cost one job."""

    has_snapshot: bool = False
    step_seconds: float = 0.0


class SnapshotPace:
    """Hands out a share of the step time, to the job that would lose most; one snapshot a plan at most.

    The first snapshot of a job is due after its first step whatever was spent; what is spent too much is
    saved thereafter.
    """

    def __init__(self, max_share: float = MAX_SHARE) -> None:
        self._max_share = max_share
        self._lost: dict[str, _Lost] = {}
        self._cost_seconds = 0.0
        # Earned by steps and not spent; below zero after first snapshots.
        self._budget_seconds = 0.0

    def next_claim(self, step_claims: Sequence[str]) -> str | None:
        """Which of the jobs of a step hands up a snapshot after it, if one does."""
        due = [
            (not lost.has_snapshot, lost.step_seconds, claim_id)
            for claim_id in step_claims
            if not (lost := self._lost.get(claim_id, _Lost())).has_snapshot
            or self._budget_seconds >= self._cost_seconds
        ]
        return max(due)[2] if due else None

    def stepped(self, claim_ids: Sequence[str], step_seconds: float) -> None:
        """Note a step of these jobs."""
        for claim_id in claim_ids:
            self._lost.setdefault(claim_id, _Lost()).step_seconds += step_seconds
        earned_seconds = self._max_share * step_seconds
        # No more than a snapshot is saved up: a quiet hour must not pay for a burst.
        self._budget_seconds = min(
            self._budget_seconds + earned_seconds, max(self._cost_seconds, earned_seconds)
        )

    def taken(self, claim_id: str, snapshot_seconds: float, size_bytes: int) -> float:
        """Note a snapshot; returns what it cost, the way to the server included, in seconds."""
        cost_seconds = snapshot_seconds + size_bytes / TRANSFER_BYTES_PER_SECOND
        self._cost_seconds = cost_seconds
        self._budget_seconds -= cost_seconds
        self._lost[claim_id] = _Lost(has_snapshot=True)
        return cost_seconds

    def forget(self, claim_id: str) -> None:
        """Forget a job that has ended."""
        self._lost.pop(claim_id, None)
