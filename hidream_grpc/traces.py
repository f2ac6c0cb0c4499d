"""Where in a trace work belongs, and the spans that are made of it. Knows nothing of OpenTelemetry.

`server/tracing.py` exports the spans, where the operator asks for it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

logger = logging.getLogger(__name__)

_TraceId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
_SpanId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]

AttributeValue = str | bool | int | float | Sequence[int] | Sequence[float]
Attributes = Mapping[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The place of one span in a trace; ids are lower-case hexadecimal, as in W3C's Trace Context.

    Attributes:
        is_sampled: whether spans of this trace are exported.
        parent_span_id: span that this one is a child of; None for a root, and where it is not known.
        trace_state: what vendors keep beside the ids, as their header has it.
    """

    trace_id: _TraceId
    span_id: _SpanId
    is_sampled: bool = True
    parent_span_id: _SpanId | None = None
    trace_state: str = ""

    def child(self) -> TraceContext:
        """A new place below this one."""
        return TraceContext(
            self.trace_id, secrets.token_hex(8), self.is_sampled, self.span_id, self.trace_state
        )

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about this span carries."""
        return {"trace_id": self.trace_id, "span_id": self.span_id}


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at one moment of a span, in seconds since the epoch."""

    name: str
    time: float
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class FinishedSpan:
    """Work that has ended; times are seconds since the epoch.

    Attributes:
        error: why the work failed; None where it did not.
    """

    name: str
    context: TraceContext
    start_time: float
    end_time: float
    attributes: Attributes
    events: Sequence[SpanEvent] = field(default=())
    error: str | None = None


RecordSpan = Callable[[FinishedSpan], None]
"""Exports a span; never blocks and never raises."""

_failures_logged: set[type[Exception]] = set()
_current: ContextVar[TraceContext | None] = ContextVar("current_trace", default=None)


class FailingAlone(ContextDecorator):
    """Keeps a failure in making spans from the work that they are about; the log has each kind of it once."""

    def __enter__(self) -> None:
        """Begin to keep failures."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, frames: object) -> bool:
        """Log a failure that is new."""
        if isinstance(error, Exception) and type(error) not in _failures_logged:
            _failures_logged.add(type(error))
            logger.warning("a span is lost: %s: %s (not logged again)", type(error).__name__, error)
            logger.debug("where the span was lost", exc_info=error)
        return isinstance(error, Exception)


def current_trace() -> TraceContext | None:
    """The span that the running task works for; None where it is not traced."""
    return _current.get()


def enter_trace(context: TraceContext | None) -> None:
    """Make this the span that the running task works for, until the task ends."""
    _current.set(context)


def add_trace_ids(record: logging.LogRecord) -> bool:
    """Add the ids of the current span to a log record that has none: a filter that lets all records pass."""
    if (context := _current.get()) is not None and not hasattr(record, "trace_id"):
        record.__dict__.update(context.log_fields)
    return True
