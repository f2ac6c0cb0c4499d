"""Whether OpenTelemetry's own variables ask for traces; where they do not, nothing of it is imported."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hidream.otlp import SpanExport

logger = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTERS = "OTEL_TRACES_EXPORTER"
_IS_DISABLED = "OTEL_SDK_DISABLED"
_OTLP = "otlp"
_GRPC = "grpc"


def span_export(environment: Mapping[str, str], service_name: str, service_version: str) -> SpanExport | None:
    """The export of the spans of a service; None where the variables ask for none, or for what cannot be.

    Wrong variables are no reason not to serve: the log says why there are no traces.

    Args:
        environment: of this process.
        service_name: its name in traces, unless the variables give it another one.
        service_version: its version.
    """
    if (variable := _asking_variable(environment)) is None:
        return None
    protocol = _first_of(environment, _PROTOCOLS) or _GRPC
    if protocol != _GRPC:
        logger.warning("no traces: they are exported over grpc alone, not over %r", protocol)
        return None
    try:
        from hidream.otlp import SpanExport
    except ModuleNotFoundError as error:
        logger.warning(
            "no traces: %s is set, but %s is missing: install the extra otel", variable, error.name
        )
        return None
    try:
        return SpanExport(service_name, service_version)
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
