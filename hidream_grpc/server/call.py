"""The facts of the call that is being served, for its log line."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

from hidream_grpc.jobs.job import CancelReason

# grpc cancels the handler of a call a little before its deadline by our clock.
DEADLINE_MARGIN_SECONDS = 0.1


@dataclass(slots=True)
class Call:
    """Facts of one call, filled in while it is served.

    Attributes:
        deadline: the caller's, on the clock of time.monotonic; None for none.
        caller: takes turns with others, and has limits; named by token or certificate, or a host.
        owner: the caller whose jobs may be seen; empty, for all of them, where callers are hosts.
    """

    method: str
    peer: str
    deadline: float | None
    caller: str = ""
    owner: str = ""
    request_id: str = ""
    job_id: str = ""

    @property
    def deadline_has_passed(self) -> bool:
        """Whether a call that ends now ends because of its deadline."""
        return self.deadline is not None and time.monotonic() > self.deadline - DEADLINE_MARGIN_SECONDS

    def leaving_reason(self) -> CancelReason:
        """Why a caller that leaves now leaves."""
        return CancelReason.DEADLINE if self.deadline_has_passed else CancelReason.CALLER_LEFT


_current_call: ContextVar[Call] = ContextVar("current_call")


def begin_call(call: Call) -> None:
    """Make this the call that the running task serves."""
    _current_call.set(call)


def current_call() -> Call:
    """The call that the running task serves."""
    return _current_call.get()
