"""Calls and finished work as spans of OpenTelemetry; imported where traces are asked for alone."""

from __future__ import annotations

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from hidream.otlp import SpanExport
from hidream_grpc.server.call import Call
from hidream_grpc.server.tracing import Metadata
from hidream_grpc.traces import FailingAlone, FinishedSpan, TraceContext

# By the conventions for gRPC servers: other codes are the caller's.
_ERRORS_OF_SERVER = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)


class OpenTelemetry:
    """The `Tracing` of `server/tracing.py`; it belongs to the event loop's thread.

    Whatever the SDK raises ends here: what the spans are about goes on.
    """

    def __init__(self, export: SpanExport) -> None:
        self._export = export

    def begin_call(self, method: str, peer: str, metadata: Metadata) -> ServerSpan | None:
        """Begin the span of a call, below that of its caller if the metadata names one; None if it fails."""
        headers = {key: value for key, value in metadata if isinstance(value, str)}
        name = method.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": name, "client.address": peer}
        with FailingAlone():
            return ServerSpan(self._export, self._export.begin_server_span(name, headers, attributes))
        return None

    @FailingAlone()
    def record(self, span: FinishedSpan) -> None:
        """Export a span that has ended, under the ids that it has."""
        if not span.context.is_sampled or span.context.parent_span_id is None:
            return
        parent = _context_below(span.context, span.context.parent_span_id)
        start_time = _nanoseconds(span.start_time)
        with self._export.ids.chosen(int(span.context.span_id, 16)):
            recorded = self._export.tracer.start_span(
                span.name, parent, attributes=span.attributes, start_time=start_time
            )
        for event in span.events:
            recorded.add_event(event.name, event.attributes, _nanoseconds(event.time))
        if span.error is not None:
            recorded.set_status(Status(StatusCode.ERROR, span.error))
        recorded.end(_nanoseconds(max(span.start_time, span.end_time)))

    async def close(self) -> None:
        """Export what is left, for a moment at most."""
        with FailingAlone():
            await self._export.close()


class ServerSpan:
    """The span of a call that is being served."""

    def __init__(self, export: SpanExport, span: Span) -> None:
        self._export = export
        self._span = span
        self.context = _context_of(span.get_span_context())

    @FailingAlone()
    def end(self, call: Call, code: grpc.StatusCode) -> None:
        """Export the span, with what became of the call."""
        attributes = {
            "rpc.response.status_code": code.name,
            "hidream.caller": call.caller,
            "hidream.request_id": call.request_id,
            "hidream.job_id": call.job_id,
        }
        self._span.set_attributes({name: value for name, value in attributes.items() if value})
        if code in _ERRORS_OF_SERVER:
            self._export.mark_failed(self._span, code.name)
        self._span.end()


def _context_below(context: TraceContext, parent_span_id: str) -> Context:
    parent = SpanContext(
        int(context.trace_id, 16),
        int(parent_span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=TraceState.from_header([context.trace_state]),
    )
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _context_of(context: SpanContext) -> TraceContext:
    return TraceContext(
        format_trace_id(context.trace_id),
        format_span_id(context.span_id),
        context.trace_flags.sampled,
        trace_state=context.trace_state.to_header(),
    )


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
