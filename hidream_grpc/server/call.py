"""What is known of the call that is being served, for its log line."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Call:
    """Facts of one call, filled in while it is served."""

    method: str
    peer: str
    request_id: str = ""
    job_id: str = ""


_current_call: ContextVar[Call] = ContextVar("current_call")


def begin_call(call: Call) -> None:
    """Make this the call of the running task."""
    _current_call.set(call)


def current_call() -> Call:
    """The call that the running task serves."""
    return _current_call.get()
