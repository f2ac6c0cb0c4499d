"""The contract over HTTP: one route for each annotation, and one way to serve them all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from hidream.v1 import image_gen_pb2
from hidream_http.bridge import Bridge
from hidream_http.leaving import unless_left
from hidream_http.transcoding.framing import Framing, as_json
from hidream_http.transcoding.images import image_response
from hidream_http.transcoding.methods import HttpMethod, http_methods
from hidream_http.transcoding.requests import message_in
from hidream_http.transcoding.streams import stream_response

SERVICE = image_gen_pb2.DESCRIPTOR.services_by_name["ImageGen"]


def routes(bridge: Bridge) -> list[BaseRoute]:
    """One route for each way to call a method."""
    return [_route(bridge, method) for method in http_methods(SERVICE)]


def _route(bridge: Bridge, method: HttpMethod) -> Route:
    route = Route(method.path, _endpoint(bridge, method), methods=[method.verb], name=method.name)
    if method.is_stream and not method.is_image and route.methods is not None:
        # A stream would run for nobody.
        route.methods.discard("HEAD")
    return route


def _endpoint(bridge: Bridge, method: HttpMethod) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        message: Any = await message_in(request, method)
        caller = bridge.caller(request)
        call = getattr(bridge.stub, method.name)
        if not method.is_stream:
            answer = await unless_left(request, bridge.drain, caller.answer(call, message))
            return Response(as_json(answer), media_type="application/json")
        if method.is_image:
            return await image_response(
                request, bridge.drain, lambda asked: caller.stream(call, asked), message
            )
        framing = Framing.asked_for(request.headers.get("accept", ""), method)
        # What never ends by itself would take all the time that others have to end.
        ending = bridge.drain.has_begun if method.is_endless else bridge.drain.is_over
        return await stream_response(request, ending, caller.stream(call, message), framing)

    return answer
