"""The application: which faces the bridge has, and what is around all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from hidream.errors import ServerError
from hidream_http import health, metrics, openai_images, page, replaced_server
from hidream_http.body_limit import BodyLimit
from hidream_http.bridge import Bridge
from hidream_http.documentation import routes as documentation
from hidream_http.draining import Drain, RefusedWhileDraining
from hidream_http.metrics import Metrics
from hidream_http.observing import Observed
from hidream_http.problems import ProblemError, answer_with_problem
from hidream_http.settings import Settings
from hidream_http.tracing import Tracing
from hidream_http.transcoding import routes as transcoding

# The first route that matches answers: a browser gets the page at /, a program what the replaced server said.
FACES = (
    openai_images.routes,
    transcoding.routes,
    documentation.routes,
    page.routes,
    replaced_server.routes,
)

# What a page of another origin may send and read, beside what every page may.
_REQUEST_HEADERS = (
    "Authorization",
    "If-None-Match",
    "If-Range",
    "Last-Event-ID",
    "Range",
    "Request-Timeout",
    "traceparent",
    "tracestate",
)
_RESPONSE_HEADERS = ("Content-Range", "ETag", "Repr-Digest", "Retry-After", "WWW-Authenticate")


def build(settings: Settings, drain: Drain) -> Starlette:
    """The application of a bridge, which any server of ASGI can run.

    Raises:
        SettingError: the address of the server is none.
    """
    bridge = Bridge.of(settings, drain)
    tracing = Tracing.of_environment()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await bridge.connection.close()
            await tracing.close()

    observed = Metrics()
    faces = [route for routes in FACES for route in routes(bridge)]
    return Starlette(
        routes=[*health.routes(bridge), *metrics.routes(observed), *faces],
        exception_handlers={
            ServerError: answer_with_problem,
            ProblemError: answer_with_problem,
            HTTPException: answer_with_problem,
            Exception: answer_with_problem,
        },
        lifespan=lifespan,
        middleware=[
            Middleware(Observed, observed, tracing),
            *_cors(settings.cors_origins),
            Middleware(RefusedWhileDraining, drain),
            Middleware(BodyLimit, settings.max_body_bytes),
        ],
    )


def _cors(origins: tuple[str, ...]) -> list[Middleware]:
    """Let pages of these origins call; without any, a browser lets only our own."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=_REQUEST_HEADERS,
            expose_headers=_RESPONSE_HEADERS,
        )
    ]
