"""Traces, where OpenTelemetry's own variables ask for them; otherwise nothing of it is imported."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

import grpc

from hidream_grpc.server.call import Call
from hidream_grpc.traces import FinishedSpan, TraceContext

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTERS = "OTEL_TRACES_EXPORTER"
_IS_DISABLED = "OTEL_SDK_DISABLED"
_OTLP = "otlp"
_GRPC = "grpc"

Metadata = Iterable[tuple[str, str | bytes]]


class CallSpan(Protocol):
    """The span of a call that is being served."""

    @property
    def context(self) -> TraceContext:
        """Its place in the trace: below the span of the caller that has sent one."""

    def end(self, call: Call, code: grpc.StatusCode) -> None:
        """Export it, with what became of the call."""


class Tracing(Protocol):
    """Makes and exports spans; nothing of it waits for who receives them."""

    def begin_call(self, method: str, peer: str, metadata: Metadata) -> CallSpan:
        """Begin the span of a call; its parent is in the metadata as W3C's Trace Context has it."""

    def record(self, span: FinishedSpan) -> None:
        """Export a span that has ended."""

    async def close(self) -> None:
        """Export what is left, for a moment at most."""


def tracing_of(environment: Mapping[str, str]) -> Tracing | None:
    """The traces that the variables ask for; None where they ask for none, or for what cannot be.

    Wrong variables are no reason not to serve: the log says why there are no traces.
    """
    if (variable := _asking_variable(environment)) is None:
        return None
    protocol = _first_of(environment, _PROTOCOLS) or _GRPC
    if protocol != _GRPC:
        logger.warning("no traces: they are exported over grpc alone, not over %r", protocol)
        return None
    try:
        from hidream_grpc.server.open_telemetry import OpenTelemetry
    except ModuleNotFoundError as error:
        logger.warning(
            "no traces: %s is set, but %s is missing: install hidream-grpc[otel]", variable, error.name
        )
        return None
    try:
        return OpenTelemetry()
    except Exception as error:
        logger.warning("no traces: the variables OTEL_… cannot be used: %s", error)
        return None


def _asking_variable(environment: Mapping[str, str]) -> str | None:
    """The variable that asks for traces; None where nothing does, or another one forbids them."""
    if environment.get(_IS_DISABLED, "").strip().lower() == "true":
        return None
    if exporters := environment.get(_EXPORTERS, "").strip():
        return _EXPORTERS if _OTLP in (name.strip() for name in exporters.split(",")) else None
    return next((name for name in _ENDPOINTS if environment.get(name, "").strip()), None)


def _first_of(environment: Mapping[str, str], names: Iterable[str]) -> str:
    return next((value for name in names if (value := environment.get(name, "").strip())), "")
