"""Spans on their way to a receiver, by OpenTelemetry's SDK over OTLP; `hidream.tracing` imports it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import OTEL_SPAN_EVENT_COUNT_LIMIT
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
"""How long what is left is exported at the end; a receiver that does not answer costs no more."""


class SpanExport:
    """The spans of one process; nothing that makes one waits for who receives it.

    Raises:
        Exception: a variable has a value that the SDK refuses.

    Attributes:
        tracer: begins spans, in one thread.
        ids: gives the ids of spans.
    """

    def __init__(self, service_name: str, service_version: str) -> None:
        # First, since a failure must leave no thread.
        self._exporter = _Exporter(OTLPSpanExporter())
        _outages.begin()
        self._processor = BatchSpanProcessor(self._exporter)
        self._propagator = TraceContextTextMapPropagator()
        self.ids = SpanIds()
        provider = TracerProvider(
            resource=_resource(service_name, service_version),
            id_generator=self.ids,
            span_limits=_span_limits(),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._processor)
        self.tracer = provider.get_tracer(service_name, service_version)

    def begin_server_span(
        self, name: str, headers: Mapping[str, str], attributes: Mapping[str, AttributeValue]
    ) -> Span:
        """Begin the span of a call that is served, below that of its caller where the headers name one."""
        return self.tracer.start_span(name, self._propagator.extract(headers), SpanKind.SERVER, attributes)

    def headers_of(self, span: Span) -> dict[str, str]:
        """The headers that make a call a part of the span, as W3C's Trace Context has them."""
        headers: dict[str, str] = {}
        self._propagator.inject(headers, set_span_in_context(span, Context()))
        return headers

    def mark_failed(self, span: Span, error_type: str) -> None:
        """Note that what the span is about went wrong here, and not at the caller."""
        span.set_attribute("error.type", error_type)
        span.set_status(Status(StatusCode.ERROR))

    async def close(self) -> None:
        """Export what is left, for a moment at most."""
        ending = threading.Thread(target=self._processor.shutdown, name="last spans", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, CLOSE_SECONDS)
        if ending.is_alive():
            logger.warning("the last spans were not exported within %g s", CLOSE_SECONDS)
            self._exporter.shutdown()


class SpanIds(RandomIdGenerator):
    """Gives random ids, unless one was chosen: a span that others are children of keeps its own."""

    _chosen: int | None = None

    @contextmanager
    def chosen(self, span_id: int) -> Iterator[None]:
        """Give this id to the span that begins in the block."""
        self._chosen = span_id
        try:
            yield
        finally:
            self._chosen = None

    def generate_span_id(self) -> int:
        """The id of a span that begins."""
        return super().generate_span_id() if self._chosen is None else self._chosen


class _OutageLog(logging.Handler):
    """Passes on one line of what OpenTelemetry logs, until spans are exported again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._has_begun = False

    def begin(self) -> None:
        """Take what OpenTelemetry logs in this process, from now on."""
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


_outages = _OutageLog()


class _Exporter(SpanExporter):
    """An exporter that says when it works."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            _outages.note_success()
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _span_limits() -> SpanLimits:
    """All events of a span, unless the operator limits them: who makes them has limits of its own."""
    is_limited = OTEL_SPAN_EVENT_COUNT_LIMIT in os.environ
    return SpanLimits(max_events=None if is_limited else SpanLimits.UNSET)


def _resource(service_name: str, service_version: str) -> Resource:
    """What makes the spans; the operator's variables go before our own words."""
    ours = {
        "service.name": service_name,
        "service.version": service_version,
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource.create().merge(Resource(ours)).merge(OTELResourceDetector().detect())
