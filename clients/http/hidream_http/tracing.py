"""Spans of the requests of HTTP, and the headers by which the calls of the bridge are part of them."""

from __future__ import annotations

import logging
import os
from contextlib import ContextDecorator
from typing import TYPE_CHECKING

from starlette.types import Scope

from hidream.tracing import span_export
from hidream_http import __version__

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from hidream.otlp import SpanExport

logger = logging.getLogger(__name__)

SERVICE_NAME = "hidream-http"
TRACE_HEADERS = ("traceparent", "tracestate")
_IN_SCOPE = "hidream_http.trace_headers"
_SERVER_ERROR = 500
_failures_logged: set[type[Exception]] = set()


class FailingAlone(ContextDecorator):
    """Keeps a failure in making spans from the requests; the log has each kind of it once."""

    def __enter__(self) -> None:
        """Begin to keep failures."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, frames: object) -> bool:
        """Log a failure that is new."""
        if isinstance(error, Exception) and type(error) not in _failures_logged:
            _failures_logged.add(type(error))
            logger.warning("a span is lost: %s: %s (not logged again)", type(error).__name__, error)
            logger.debug("where the span was lost", exc_info=error)
        return isinstance(error, Exception)


class Tracing:
    """Makes a span of each request, where OpenTelemetry's variables ask for it.

    Whatever the SDK raises ends here: requests go on.
    """

    def __init__(self, export: SpanExport | None) -> None:
        self._export = export

    @classmethod
    def of_environment(cls) -> Tracing:
        """What the variables of this process ask for."""
        return cls(span_export(os.environ, SERVICE_NAME, __version__))

    def begin(self, scope: Scope, method: str) -> RequestSpan | None:
        """Begin the span of a request, below that of its caller; None where it has none.

        Args:
            scope: of the request.
            method: of HTTP, or a word for all that are none.
        """
        if self._export is None:
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {
            "http.request.method": method,
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
        }
        if scope.get("client"):
            attributes["client.address"] = scope["client"][0]
        with FailingAlone():
            span = self._export.begin_server_span(method, headers, attributes)
            scope[_IN_SCOPE] = self._export.headers_of(span)
            return RequestSpan(self._export, span)
        return None

    async def close(self) -> None:
        """Export what is left, for a moment at most."""
        if self._export is not None:
            with FailingAlone():
                await self._export.close()


class RequestSpan:
    """The span of a request that is being served."""

    def __init__(self, export: SpanExport, span: Span) -> None:
        self._export = export
        self._span = span
        context = span.get_span_context()
        self.log_fields = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    @FailingAlone()
    def end(self, method: str, route: str, status: int) -> None:
        """Export the span, with what became of the request."""
        self._span.set_attribute("http.response.status_code", status)
        if route:
            self._span.set_attribute("http.route", route)
            self._span.update_name(f"{method} {route}")
        if status >= _SERVER_ERROR:
            self._export.mark_failed(self._span, str(status))
        self._span.end()


def trace_headers(scope: Scope) -> dict[str, str] | None:
    """The headers of calls that are made for a request; None where it has no span: then those that it has."""
    headers: dict[str, str] | None = scope.get(_IN_SCOPE)
    return headers
