"""A processor of OpenTelemetry's SDK that fails, as one of another package may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, SynchronousMultiSpanProcessor

from hidream.otlp import SpanExport
from tests.support.trace_receiver import trace_receiver


class FailingProcessor(SpanProcessor):
    """Raises at the start or the end of every span."""

    def __init__(self, error: Exception, when: str) -> None:
        self._error = error
        self._when = when

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if self._when == "start":
            raise self._error

    def on_end(self, span: ReadableSpan) -> None:
        if self._when == "end":
            raise self._error


@contextmanager
def failing_export(error: Exception, when: str) -> Iterator[SpanExport]:
    """An export whose SDK raises this at the "start" or the "end" of every span."""
    with trace_receiver() as receiver, pytest.MonkeyPatch.context() as variables:
        for name, value in receiver.environment().items():
            variables.setenv(name, value)
        export = SpanExport("service", "1")
        processor: SynchronousMultiSpanProcessor = export.tracer.span_processor  # type: ignore[attr-defined]
        processor.add_span_processor(FailingProcessor(error, when))
        try:
            yield export
        finally:
            processor.shutdown()
