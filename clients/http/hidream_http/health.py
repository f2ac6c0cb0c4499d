"""Whether the bridge lives, and whether requests would be answered."""

from __future__ import annotations

import grpc
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from hidream.connection import SERVICE_NAME
from hidream.health import health_request, health_status
from hidream_http.bridge import Bridge

CHECK_TIMEOUT_SECONDS = 5.0


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes for whatever watches over the process."""

    async def alive(_: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(_: Request) -> Response:
        status = "DRAINING" if bridge.drain.has_begun.is_set() else await _server_status(bridge)
        return JSONResponse({"status": status}, 200 if status == "SERVING" else 503)

    return [Route("/healthz", alive), Route("/readyz", ready)]


async def _server_status(bridge: Bridge) -> str:
    try:
        checked = await bridge.connection.health.Check(
            health_request(SERVICE_NAME), timeout=CHECK_TIMEOUT_SECONDS
        )
    except grpc.RpcError as error:
        assert isinstance(error, grpc.aio.AioRpcError)
        return error.code().name
    return health_status(checked)
