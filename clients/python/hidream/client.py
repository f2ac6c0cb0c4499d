"""The client for ordinary code. `hidream.aio` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Generator
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


class Client:
    """One connection to a server. Threads may share it; close it, or use it in a `with`.

    Every method raises the errors of `hidream.errors`. `timeout_seconds` is the deadline of the
    whole call, which travels to the server; None is none.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, token: str | None = None, tls: Tls | None = None
    ) -> None:
        """Connects when it is first used.

        Args:
            address: `host:port`, or any other target that gRPC knows.
            token: bearer token, for servers that ask for one. Without `tls` it travels unencrypted.
            tls: encrypts the connection.
        """
        options = channel_options(tls)
        self._channel = (
            grpc.secure_channel(address, tls.credentials(), options)
            if tls
            else grpc.insecure_channel(address, options)
        )
        self._metadata = call_metadata(token)
        self._image_gen = ImageGenStub(self._channel)
        self._health = HealthStub(self._channel)

    def close(self) -> None:
        """Close the connection; calls that are under way are cancelled. May be called twice."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Event]:
        """Draw images and follow it: every event as it happens, `Succeeded` last.

        The call starts with the first event that is asked for. Closing the generator, or leaving
        it, cancels the call, and so the job unless `detached` is set.

        Raises:
            ServerError: the request was refused, or the job failed.
            StreamError: the images did not arrive as they were sent.
        """
        return self._follow(generate_request(prompt, **options), timeout_seconds)

    def _follow(
        self, request: image_gen_pb2.GenerateRequest, timeout_seconds: float | None
    ) -> Generator[Event]:
        reader = EventReader()
        with translated_errors():
            call = self._image_gen.Generate(request, timeout=timeout_seconds, metadata=self._metadata)
            try:
                for response in call:
                    event = reader.read(response.job_id, response.event)
                    if event:
                        yield event
            finally:
                call.cancel()
        reader.finish()

    def draw(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[GenerateOptions]
    ) -> list[Image]:
        """Draw images and wait for them, in the order of their index. Raises what `generate` does."""
        events = self.generate(prompt, timeout_seconds=timeout_seconds, **options)
        images = [event.image for event in events if isinstance(event, ImageFinished)]
        return sorted(images, key=lambda image: image.index)

    def info(self, *, timeout_seconds: float | None = None) -> server_info_pb2.ServerInfo:
        """Describe the server: model, devices, load, versions, defaults and every limit."""
        request = image_gen_pb2.GetServerInfoRequest()
        with translated_errors():
            return self._image_gen.GetServerInfo(request, timeout=timeout_seconds, metadata=self._metadata)

    def health(self, *, timeout_seconds: float | None = None, service: str = SERVICE_NAME) -> HealthStatus:
        """Whether the server takes requests. `service` "" asks for the server as a whole."""
        with translated_errors():
            return health_status(
                self._health.Check(health_request(service), timeout=timeout_seconds, metadata=self._metadata)
            )

    def wait_until_serving(self, timeout_seconds: float, *, service: str = SERVICE_NAME) -> None:
        """Return as soon as the server takes requests; it may not even have started yet.

        Raises:
            NotServingError: it did not in this time.
        """
        wait = ServingWait(timeout_seconds)
        while True:
            call = self._health.Watch(
                health_request(service),
                timeout=wait.remaining_seconds(),
                wait_for_ready=True,
                metadata=self._metadata,
            )
            try:
                for response in call:
                    if wait.is_over(response):
                        return
            except grpc.RpcError as error:
                time.sleep(wait.retry_delay_seconds(error))
            finally:
                call.cancel()
