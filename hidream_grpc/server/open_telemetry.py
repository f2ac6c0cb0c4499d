"""Exports spans by OpenTelemetry's SDK, over OTLP. Imported where traces are asked for, and nowhere else."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Sequence

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hidream_grpc.server.call import Call
from hidream_grpc.server.tracing import Metadata
from hidream_grpc.traces import FinishedSpan, TraceContext
from hidream_grpc.version import SERVER_VERSION

logger = logging.getLogger(__name__)

SERVICE_NAME = "hidream-grpc"
CLOSE_SECONDS = 1.0
"""How long what is left is exported when the server ends; a receiver that does not answer costs no more."""

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
    """The `Tracing` of `server/tracing.py`. All but the export belongs to the event loop's thread.

    Raises:
        Exception: a variable has a value that the SDK refuses.
    """

    def __init__(self) -> None:
        # First, since a failure must leave no thread.
        self._outages = _OutageLog()
        self._exporter = _Exporter(OTLPSpanExporter(), self._outages)
        self._processor = BatchSpanProcessor(self._exporter)
        self._ids = _SpanIds()
        provider = TracerProvider(resource=_resource(), id_generator=self._ids, shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("hidream_grpc", SERVER_VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def begin_call(self, method: str, peer: str, metadata: Metadata) -> ServerSpan:
        """Begin the span of a call, below that of its caller where the metadata names one."""
        headers = {key: value for key, value in metadata if isinstance(value, str)}
        name = method.removeprefix("/")
        attributes = {"rpc.system.name": "grpc", "rpc.method": name, "client.address": peer}
        parent = self._propagator.extract(headers)
        return ServerSpan(self._tracer.start_span(name, parent, SpanKind.SERVER, attributes))

    def record(self, span: FinishedSpan) -> None:
        """Export a span that has ended, under the ids that it has."""
        if not span.context.is_sampled:
            return
        self._ids.next_span_id = int(span.context.span_id, 16)
        recorded = self._tracer.start_span(
            span.name,
            _parent_of(span.context),
            attributes=span.attributes,
            start_time=_nanoseconds(span.start_time),
        )
        for event in span.events:
            recorded.add_event(event.name, event.attributes, _nanoseconds(event.time))
        if span.error is not None:
            recorded.set_status(Status(StatusCode.ERROR, span.error))
        recorded.end(_nanoseconds(max(span.start_time, span.end_time)))

    async def close(self) -> None:
        """Export what is left, for a moment at most."""
        ending = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, CLOSE_SECONDS)
        if ending.is_alive():
            logger.warning("the last spans were not exported within %g s", CLOSE_SECONDS)
            self._exporter.shutdown()


class ServerSpan:
    """The span of a call that is being served."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.context = _context_of(span.get_span_context())

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
            self._span.set_attribute("error.type", code.name)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class _SpanIds(RandomIdGenerator):
    """Gives random ids, unless the next one was chosen: a span that others are children of keeps its own."""

    next_span_id: int | None = None

    def generate_span_id(self) -> int:
        chosen, self.next_span_id = self.next_span_id, None
        return super().generate_span_id() if chosen is None else chosen


class _OutageLog(logging.Handler):
    """Passes on one line of what OpenTelemetry logs, until spans are exported again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._has_begun = False
        sdk_logger = logging.getLogger("opentelemetry")
        sdk_logger.propagate = False
        sdk_logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_begun:
            self._has_begun = True
            logger.warning("cannot export traces: %s; trying again", record.getMessage())

    def note_success(self) -> None:
        if self._has_begun:
            self._has_begun = False
            logger.info("can export traces again")


class _Exporter(SpanExporter):
    """An exporter that says when it works."""

    def __init__(self, exporter: SpanExporter, outages: _OutageLog) -> None:
        self._exporter = exporter
        self._outages = outages

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._outages.note_success()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _resource() -> Resource:
    """What makes the spans; the operator's variables go before our own words."""
    ours = {
        "service.name": SERVICE_NAME,
        "service.version": SERVER_VERSION,
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource.create().merge(Resource(ours)).merge(OTELResourceDetector().detect())


def _parent_of(context: TraceContext) -> Context:
    parent = SpanContext(
        int(context.trace_id, 16),
        int(context.parent_span_id, 16),
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
