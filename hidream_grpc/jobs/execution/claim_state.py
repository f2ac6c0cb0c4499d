"""The states of one claim of a job. Pure: every change gives a new value.

    RUNNING → STOPPING (give back < cancel < lost) → ENDED

A claim is stopped for one reason, the strongest that came; asking twice changes nothing. A claim that was
lost is another replica's: nothing is written of it any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, IntEnum

from hidream_grpc.jobs.job import CancelReason


class StopReason(IntEnum):
    """Why a claim stops; the greater reason is the stronger."""

    GIVE_BACK = 1
    """The job waits again, for any replica."""
    CANCEL = 2
    """The job ends as CANCELLED."""
    LOST = 3
    """Another replica has the job, or it was removed."""


class Storing(Enum):
    """How often the store is tried for what a claim still has to write."""

    UNTIL_STORED = "until stored"
    FOR_A_WHILE = "for a while"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class ClaimState:
    """The state of a claim.

    Attributes:
        stop_reason: None while it runs.
        cancel_reason: the first reason that was given, of a claim that is or was to be cancelled.
        has_ended: whether nothing more can happen to it.
    """

    stop_reason: StopReason | None = None
    cancel_reason: CancelReason | None = None
    has_ended: bool = False

    @property
    def is_running(self) -> bool:
        """Whether the engine goes on with the job."""
        return self.stop_reason is None and not self.has_ended

    @property
    def storing(self) -> Storing:
        """How often the store is tried for what the claim has to write in this state."""
        match self.stop_reason:
            case StopReason.LOST:
                return Storing.NEVER
            case StopReason.GIVE_BACK:
                return Storing.FOR_A_WHILE
            case _:
                return Storing.UNTIL_STORED

    def cancelled(self, reason: CancelReason) -> ClaimState:
        """The state after a cancel: the job ends as CANCELLED, unless the claim is lost or has ended."""
        if self.has_ended or self.stop_reason in (StopReason.CANCEL, StopReason.LOST):
            return self
        return replace(self, stop_reason=StopReason.CANCEL, cancel_reason=reason)

    def given_back(self) -> ClaimState:
        """The state after giving back: the job waits again, unless the claim is stopped or has ended."""
        return replace(self, stop_reason=StopReason.GIVE_BACK) if self.is_running else self

    def lost(self) -> ClaimState:
        """The state after a loss: the job is another replica's, unless the claim has ended."""
        return self if self.has_ended else replace(self, stop_reason=StopReason.LOST)

    def ended(self) -> ClaimState:
        """The state after the end: everything is written, or never will be."""
        return replace(self, has_ended=True)
