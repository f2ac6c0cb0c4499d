"""The client for asyncio: `hidream.client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Self, Unpack

import grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

from hidream.connection import DEFAULT_ADDRESS, SERVICE_NAME, Tls, call_metadata, channel_options
from hidream.errors import translated_errors
from hidream.events import Event, EventReader, ImageFinished
from hidream.health import HealthStatus, ServingWait, health_request, health_status
from hidream.images import Image
from hidream.requests import GenerateOptions, generate_request
from hidream.v1 import image_gen_pb2, server_info_pb2
from hidream.v1.image_gen_pb2_grpc import ImageGenStub


class AsyncClient:
    """One connection to a server, of one event loop. Close it, or use it in an `async with`.

    Arguments, results and errors are those of `hidream.client.Client`.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, token: str | None = None, tls: Tls | None = None
    ) -> None:
        options = channel_options(tls)
        self._channel = (
            grpc.aio.secure_channel(address, tls.credentials(), options)
            if tls
            else grpc.aio.insecure_channel(address, options)
        )
        self._metadata = call_metadata(token)
        self._image_gen = ImageGenStub(self._channel)
        self._health = HealthStub(self._channel)

    async def close(self) -> None:
        """Close the connection; calls that are under way are cancelled. May be called twice."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event]:
        """As `Client.generate`. Cancelling the task that waits for an event cancels the call too.

        Who leaves early and goes on closes it, by `aclose()` or `contextlib.aclosing`: Python
        closes an abandoned asynchronous generator only some time later.
        """
        return self._follow(generate_request(prompt, **options), timeout_seconds)

    async def _follow(
        self, request: image_gen_pb2.GenerateRequest, timeout_seconds: float | None
    ) -> AsyncGenerator[Event]:
        reader = EventReader()
        with translated_errors():
            call = self._image_gen.Generate(request, timeout=timeout_seconds, metadata=self._metadata)
            try:
                async for response in call:
                    event = reader.read(response.job_id, response.event)
                    if event:
                        yield event
            finally:
                call.cancel()
        reader.finish()

    async def draw(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[GenerateOptions]
    ) -> list[Image]:
        """As `Client.draw`."""
        events = self.generate(prompt, timeout_seconds=timeout_seconds, **options)
        images = [event.image async for event in events if isinstance(event, ImageFinished)]
        return sorted(images, key=lambda image: image.index)

    async def info(self, *, timeout_seconds: float | None = None) -> server_info_pb2.ServerInfo:
        """As `Client.info`."""
        request = image_gen_pb2.GetServerInfoRequest()
        with translated_errors():
            return await self._image_gen.GetServerInfo(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def health(
        self, *, timeout_seconds: float | None = None, service: str = SERVICE_NAME
    ) -> HealthStatus:
        """As `Client.health`."""
        with translated_errors():
            return health_status(
                await self._health.Check(
                    health_request(service), timeout=timeout_seconds, metadata=self._metadata
                )
            )

    async def wait_until_serving(self, timeout_seconds: float, *, service: str = SERVICE_NAME) -> None:
        """As `Client.wait_until_serving`."""
        wait = ServingWait(timeout_seconds)
        while True:
            call = self._health.Watch(
                health_request(service),
                timeout=wait.remaining_seconds(),
                wait_for_ready=True,
                metadata=self._metadata,
            )
            try:
                async for response in call:
                    if wait.is_over(response):
                        return
            except grpc.RpcError as error:
                await asyncio.sleep(wait.retry_delay_seconds(error))
            finally:
                call.cancel()
