"""A receiver of traces over OTLP, as a collector is one, and the spans that it was sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support.live_server import wait_until

WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came; times are nanoseconds since the epoch."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    kind: int
    is_error: bool
    status_message: str
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    resource: dict[str, Any]

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9

    def text(self) -> str:
        shown = ("rpc.response.status_code", "hidream.state", "hidream.attempt", "hidream.rank")
        facts = [
            f"{name.rpartition('.')[2]}={self.attributes[name]}" for name in shown if name in self.attributes
        ]
        if self.events:
            facts.append(f"events={len(self.events)}")
        if self.is_error:
            facts.append("error")
        return f"{self.name} {self.seconds * 1000:.1f} ms {' '.join(facts)}".rstrip()


@dataclass
class TraceReceiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that is exported to it."""

    endpoint: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.spans += [
            _received(span, _values(of_resource.resource.attributes))
            for of_resource in request.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]
        return trace_service_pb2.ExportTraceServiceResponse()

    def environment(self) -> dict[str, str]:
        """Variables of a process that exports to this receiver, soon after each span has ended."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def of(self, trace_id: str, *names: str) -> list[ReceivedSpan]:
        """The spans of a trace with one of these names, or all of them, by their start."""
        found = [s for s in self.spans if s.trace_id == trace_id and (not names or s.name in names)]
        return sorted(found, key=lambda span: (span.start, -span.end))

    def wait_for(self, trace_id: str, *names: str) -> None:
        """Wait until a trace has spans of all these names."""
        wait_until(
            lambda: set(names) <= {span.name for span in self.of(trace_id)},
            WAIT_SECONDS,
            f"the trace {trace_id} has {names}",
        )

    def tree(self, trace_id: str) -> str:
        """The spans of a trace as lines of text, children indented below their parents."""
        spans = self.of(trace_id)
        known = {span.span_id for span in spans}
        roots = [span for span in spans if span.parent_id not in known]
        return "\n".join(line for root in roots for line in _lines(root, spans, 0))


@contextmanager
def trace_receiver(port: int = 0) -> Iterator[TraceReceiver]:
    """A receiver on this port of 127.0.0.1, or on a free one."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    receiver = TraceReceiver()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(0).wait()


def traceparent(trace_id: str, span_id: str, *, is_sampled: bool = True) -> tuple[tuple[str, str], ...]:
    """Metadata of a call that is part of a trace."""
    return (("traceparent", f"00-{trace_id}-{span_id}-0{is_sampled:d}"),)


def _lines(span: ReceivedSpan, spans: Sequence[ReceivedSpan], depth: int) -> Iterator[str]:
    yield "  " * depth + span.text()
    for child in spans:
        if child.parent_id == span.span_id:
            yield from _lines(child, spans, depth + 1)


def _received(span: Span, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        kind=span.kind,
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        status_message=span.status.message,
        attributes=_values(span.attributes),
        events=[(event.name, event.time_unix_nano, _values(event.attributes)) for event in span.events],
        resource=resource,
    )


def _values(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return None if kind is None else getattr(value, kind)
