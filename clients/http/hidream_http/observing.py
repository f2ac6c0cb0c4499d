"""One log line, the measurements and the span of every request."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hidream_http.metrics import Metrics
from hidream_http.problems import CLIENT_CLOSED_REQUEST
from hidream_http.tracing import RequestSpan, Tracing

access_logger = logging.getLogger("hidream_http.access")

# A probe every second says nothing.
UNOBSERVED = ("/healthz", "/readyz", "/metrics")

# Any other is a caller's own word: each would be a series of its own for good.
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_OTHER_METHOD = "_OTHER"


class Observed:
    """Reports how each request ends."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in UNOBSERVED:
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else _OTHER_METHOD
        answer, span = _Answer(send), self._tracing.begin(scope, method)
        start = time.monotonic()
        try:
            with self._metrics.running.track_inprogress():
                await self._app(scope, receive, answer.send)
        except ClientDisconnect:
            raise
        except Exception:
            answer.fail()
            raise
        finally:
            self._report(scope, method, answer, span, time.monotonic() - start)

    def _report(
        self, scope: Scope, method: str, answer: _Answer, span: RequestSpan | None, seconds: float
    ) -> None:
        route = getattr(scope.get("route"), "path", "")
        self._metrics.observe_request(method, route, answer.status, seconds, answer.sent_bytes)
        peer = scope.get("client")
        access_logger.info(
            "%s %s %d%s",
            method,
            route or "(no route)",
            answer.status,
            "" if answer.is_whole else " broken off",
            extra={
                "method": method,
                "route": route,
                "status": answer.status,
                "peer": f"{peer[0]}:{peer[1]}" if peer else "",
                "job_id": scope.get("path_params", {}).get("job_id", ""),
                "sent_bytes": answer.sent_bytes,
                "call_seconds": round(seconds, 3),
                **({} if span is None else span.log_fields),
            },
        )
        if span is not None:
            span.end(method, route, answer.status)


class _Answer:
    """What has been sent of an answer: until it begins, its caller has left."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = CLIENT_CLOSED_REQUEST
        self.sent_bytes = 0
        self.is_whole = False

    def fail(self) -> None:
        """Note a failure of the bridge: unless the answer has begun, what is around all faces answers it."""
        if self.status == CLIENT_CLOSED_REQUEST:
            self.status, self.is_whole = HTTPStatus.INTERNAL_SERVER_ERROR, True

    async def send(self, message: Message) -> None:
        """Pass a message of ASGI on."""
        await self._send(message)
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self.sent_bytes += len(message.get("body", b""))
            self.is_whole = not message.get("more_body", False)
