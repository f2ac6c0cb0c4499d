"""What OpenTelemetry's SDK does with our spans, and that its failures stay its own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextvars import copy_context
from typing import Any

import pytest

from hidream.otlp import SpanExport
from hidream_grpc.server.interceptors import observed
from hidream_grpc.server.metrics import Metrics
from hidream_grpc.server.open_telemetry import OpenTelemetry
from hidream_grpc.traces import FinishedSpan, SpanEvent, TraceContext
from tests.support.failing_spans import failing_export
from tests.support.trace_receiver import trace_receiver

CALL = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
NUM_STEPS = 1_000


def denoise(num_steps: int) -> FinishedSpan:
    events = [SpanEvent("step", 100.0 + step, {"hidream.step": step}) for step in range(1, num_steps + 1)]
    return FinishedSpan("denoise", CALL.child(), 100.0, 101.0 + num_steps, {}, events)


class ServedContext:
    """The context of a call, as far as it is observed."""

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> Iterable[tuple[str, str]]:
        return ()


@pytest.mark.parametrize("when", ["start", "end"])
def test_a_library_of_traces_that_fails_costs_one_line_and_no_call(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    class LibraryError(Exception):
        """New to the log."""

    context: Any = ServedContext()
    served = []
    with failing_export(LibraryError("out of order"), when) as export:
        tracing = OpenTelemetry(export)

        def serve(number: int) -> None:
            with observed(Metrics(), tracing, "/hidream.v1.ImageGen/GetJob", context):
                served.append(number)

        for number in range(2):
            # As each call has a task of its own.
            copy_context().run(serve, number)
            tracing.record(denoise(1))
    assert served == [0, 1]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == ["a span is lost: LibraryError: out of order (not logged again)"]


def test_the_id_of_a_span_that_is_lost_is_not_given_to_the_next_one() -> None:
    lost = denoise(1)
    with failing_export(ValueError("out of order"), "start") as export:
        OpenTelemetry(export).record(lost)
        assert f"{export.ids.generate_span_id():016x}" != lost.context.span_id


@pytest.mark.parametrize(
    ("limit", "num_kept"), [(None, NUM_STEPS), ("10", 10)], ids=["as ever", "the operator's limit"]
)
async def test_every_step_has_its_event_unless_the_operator_limits_them(
    limit: str | None, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is not None:
        monkeypatch.setenv("OTEL_SPAN_EVENT_COUNT_LIMIT", limit)
    with trace_receiver() as receiver:
        for name, value in receiver.environment().items():
            monkeypatch.setenv(name, value)
        tracing = OpenTelemetry(SpanExport("service", "1"))
        tracing.record(denoise(NUM_STEPS))
        receiver.wait_for(CALL.trace_id, "denoise")
        await tracing.close()
    (span,) = receiver.of(CALL.trace_id)
    assert [event[2]["hidream.step"] for event in span.events] == [*range(1, NUM_STEPS + 1)][-num_kept:]
