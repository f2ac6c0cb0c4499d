"""Traces, where OpenTelemetry's own variables ask for them; otherwise nothing of it is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import grpc

from hidream.tracing import span_export
from hidream_grpc.server.call import Call
from hidream_grpc.traces import FinishedSpan, TraceContext
from hidream_grpc.version import SERVER_VERSION

SERVICE_NAME = "hidream-grpc"

Metadata = Iterable[tuple[str, str | bytes]]


class CallSpan(Protocol):
    """The span of a call that is being served."""

    @property
    def context(self) -> TraceContext:
        """Its place in the trace: below the span of the caller that has sent one."""

    def end(self, call: Call, code: grpc.StatusCode) -> None:
        """Export it, with what became of the call."""


class Tracing(Protocol):
    """Makes and exports spans; nothing of it raises, or waits for who receives them."""

    def begin_call(self, method: str, peer: str, metadata: Metadata) -> CallSpan | None:
        """Begin the span of a call; its parent is in the metadata as W3C's Trace Context has it.

        Returns:
            None where it could not be made.
        """

    def record(self, span: FinishedSpan) -> None:
        """Export a span that has ended."""

    async def close(self) -> None:
        """Export what is left, for a moment at most."""


def tracing_of(environment: Mapping[str, str]) -> Tracing | None:
    """The traces that the variables ask for; None where they ask for none, or for what cannot be."""
    export = span_export(environment, SERVICE_NAME, SERVER_VERSION)
    if export is None:
        return None
    from hidream_grpc.server.open_telemetry import OpenTelemetry

    return OpenTelemetry(export)
