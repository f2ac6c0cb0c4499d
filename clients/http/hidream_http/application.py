"""The application: which faces the bridge has, and what is around all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from importlib.util import find_spec

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from hidream.errors import ServerError
from hidream_http import health
from hidream_http.bridge import Bridge
from hidream_http.problems import ProblemError, answer_with_problem
from hidream_http.settings import Settings

# Each has `routes(bridge) -> list[BaseRoute]`; the first route that matches answers.
FACES = (
    "hidream_http.openai_images",
    "hidream_http.transcoding",
    "hidream_http.page",
    "hidream_http.replaced_server",
)


def build(settings: Settings) -> Starlette:
    """The application of a bridge, which any server of ASGI can run.

    Raises:
        SettingError: the address of the server is none.
    """
    bridge = Bridge.of(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await bridge.connection.close()

    return Starlette(
        routes=[*health.routes(bridge), *_routes_of_faces(bridge)],
        exception_handlers={
            ServerError: answer_with_problem,
            ProblemError: answer_with_problem,
            HTTPException: answer_with_problem,
            Exception: answer_with_problem,
        },
        lifespan=lifespan,
    )


def _routes_of_faces(bridge: Bridge) -> list[BaseRoute]:
    found = [import_module(name) for name in FACES if find_spec(name) is not None]
    return [route for face in found for route in face.routes(bridge)]
