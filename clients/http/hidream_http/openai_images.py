"""OpenAI's images API: what its clients send, answered by the server.

https://platform.openai.com/docs/api-reference/images
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from datetime import datetime
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from hidream.errors import HiDreamError
from hidream.events import Event, ImageFinished, Preview, Started, Succeeded
from hidream.images import Image
from hidream.v1 import image_gen_pb2, image_pb2, server_info_pb2
from hidream_http.bridge import Bridge
from hidream_http.generation import generation_events
from hidream_http.image_files import image_url
from hidream_http.leaving import unless_left
from hidream_http.openai_bodies import GenerationBody, parameter_of, read_generation
from hidream_http.openai_errors import (
    InvalidParameterError,
    UnknownModelError,
    error_body,
    error_response,
)
from hidream_http.parts import PartsResponse
from hidream_http.problems import Problem, ProblemError

_Handler = Callable[[Request], Awaitable[Response]]

OWNER = "hidream"
_STREAM_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    # nginx would hold events back until its buffer is full.
    "X-Accel-Buffering": "no",
}


def routes(bridge: Bridge) -> list[BaseRoute]:
    """The routes of OpenAI's images API."""
    api = _ImagesApi(bridge)
    return [
        Route("/v1/images/generations", _answering(api.generate), methods=["POST"]),
        Route("/v1/models", _answering(api.models)),
        Route("/v1/models/{model:path}", _answering(api.model)),
    ]


class _ImagesApi:
    """The handlers, which call the server."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    async def generate(self, request: Request) -> Response:
        """Generate images; the job is cancelled when the caller goes away."""
        body = await read_generation(request)
        events = generation_events(self._bridge.caller(request), body.message())
        drain = self._bridge.drain
        if not body.stream:
            async with aclosing(events):
                return JSONResponse(await unless_left(request, drain, _all_images(request, body, events)))
        # An error before the first event is a status.
        first = await unless_left(request, drain, _first_of(events))
        return PartsResponse(
            drain.is_over,
            _sent_events(body, first, events),
            _STREAM_HEADERS,
            problem_part=_sent_problem,
            sign_of_life=b": \n\n",
        )

    async def models(self, request: Request) -> Response:
        """List the models that a request may name."""
        info = await self._info(request)
        models = [_model(info, model.name) for model in info.live_models]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        name = request.path_params["model"]
        info = await self._info(request)
        names = [model.name for model in info.live_models]
        if name not in names:
            raise UnknownModelError(name, names)
        return JSONResponse(_model(info, name))

    async def _info(self, request: Request) -> server_info_pb2.ServerInfo:
        message = image_gen_pb2.GetServerInfoRequest()
        return await self._bridge.caller(request).answer(self._bridge.stub.GetServerInfo, message)


def _answering(handler: _Handler) -> _Handler:
    """Have a handler's errors answered as OpenAI does."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except (HiDreamError, ProblemError, HTTPException, InvalidParameterError, UnknownModelError) as error:
            return error_response(error, parameter_of)

    return answer


def _model(info: server_info_pb2.ServerInfo, name: str) -> dict[str, Any]:
    # When it was made nobody knows; since then it can be asked for.
    return {"id": name, "object": "model", "created": info.start_time.ToSeconds(), "owned_by": OWNER}


async def _first_of(events: AsyncGenerator[Event]) -> Event:
    return await anext(events)


async def _all_images(
    request: Request, body: GenerationBody, events: AsyncGenerator[Event]
) -> dict[str, Any]:
    images: dict[int, Image] = {}
    async for event in events:
        if isinstance(event, ImageFinished):
            images[event.image.index] = event.image
        elif isinstance(event, Succeeded):
            job = event.job
    data = [
        {
            **(
                {"url": image_url(request, job.job_id, info)}
                if body.response_format == "url"
                else {"b64_json": _base64(images[info.index].data)}
            ),
            "seed": info.seed,
        }
        for info in job.images
    ]
    return {"created": job.end_time.ToSeconds(), "data": data, **_description(body, job.spec)}


async def _sent_events(
    body: GenerationBody, first: Event, others: AsyncGenerator[Event]
) -> AsyncGenerator[bytes]:
    stream = _ImageStream(body)
    async with aclosing(others):
        try:
            for answer in stream.answers_to(first):
                yield _server_sent(answer)
            async for event in others:
                for answer in stream.answers_to(event):
                    yield _server_sent(answer)
        except HiDreamError as error:
            yield _sent_error(error)


class _ImageStream:
    """What a caller of `stream: true` is sent: partial images, and each image when it is there."""

    def __init__(self, body: GenerationBody) -> None:
        self._body = body
        self._spec = image_pb2.ImageSpec()
        self._num_partial_images = 0

    def answers_to(self, event: Event) -> list[dict[str, Any]]:
        """The events of OpenAI's API for one of the contract."""
        match event:
            case Started():
                self._spec = event.spec
            case Preview() if self._is_next_partial_image(event.step):
                index = self._num_partial_images
                self._num_partial_images += 1
                partial = self._answer("partial_image", event.time, event.data, event.mime_type)
                return [partial | {"partial_image_index": index}]
            case ImageFinished():
                completed = self._answer("completed", event.time, event.image.data, event.image.mime_type)
                # OpenAI counts tokens, which cost something there.
                return [completed | {"usage": None, "seed": event.image.seed}]
        return []

    def _is_next_partial_image(self, step: int) -> bool:
        """Whether the step begins the next of the equal parts, at each end of which there is an image."""
        num_asked = self._body.partial_images or 0
        share = (self._num_partial_images + 1) * self._spec.num_inference_steps
        return self._num_partial_images < num_asked and step * (num_asked + 1) >= share

    def _answer(self, name: str, time: datetime, data: bytes, mime_type: str) -> dict[str, Any]:
        return {
            "type": f"image_generation.{name}",
            "b64_json": _base64(data),
            "created_at": int(time.timestamp()),
            **_description(self._body, self._spec),
            "output_format": mime_type.removeprefix("image/"),
            "quality": "auto",
        }


def _description(body: GenerationBody, spec: image_pb2.ImageSpec) -> dict[str, Any]:
    output_format = image_pb2.OutputFormat.Name(spec.output_format).removeprefix("OUTPUT_FORMAT_").lower()
    description = {
        "background": "opaque",
        "output_format": output_format,
        "size": f"{spec.width}x{spec.height}",
    }
    return description | ({"safety_identifier": body.identifier} if body.identifier else {})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _server_sent(answer: dict[str, Any]) -> bytes:
    return f"event: {answer['type']}\ndata: {json.dumps(answer)}\n\n".encode()


def _sent_error(error: Exception) -> bytes:
    return _server_sent({"type": "error", **error_body(error, parameter_of)})


def _sent_problem(problem: Problem) -> bytes:
    return _sent_error(ProblemError(problem))
