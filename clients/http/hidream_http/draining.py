"""The end of the bridge: which requests run, and when they must end."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from hidream_http.problems import Problem, ProblemError

RETRY_AFTER_SECONDS = 1.0
# What watches over the process is answered to the end.
ALWAYS_ANSWERED = ("/healthz", "/readyz", "/metrics")


class Drain:
    """Knows the requests that run, and tells them of the end.

    Attributes:
        has_begun: whether requests are refused.
        is_over: is set when those that still run must end now.
    """

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.is_over = asyncio.Event()
        self._num_running = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def wait_until_idle(self) -> None:
        """Return as soon as no request runs."""
        await self._is_idle.wait()

    def __enter__(self) -> None:
        self._num_running += 1
        self._is_idle.clear()

    def __exit__(self, *_: object) -> None:
        self._num_running -= 1
        if not self._num_running:
            self._is_idle.set()


def end_of_bridge() -> ProblemError:
    """The error of a request that comes, or still runs, when the bridge ends."""
    detail = "the bridge ends; try again, at another one or at the next"
    return ProblemError(
        Problem(
            HTTPStatus.SERVICE_UNAVAILABLE,
            detail,
            "UNAVAILABLE",
            retry_after_seconds=RETRY_AFTER_SECONDS,
            headers=(("Connection", "close"),),
        )
    )


class RefusedWhileDraining:
    """Refuses requests once the end has begun, and counts those that run."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
        elif self._drain.has_begun.is_set():
            await end_of_bridge().problem.response()(scope, receive, send)
        else:
            with self._drain:
                await self._app(scope, receive, send)
