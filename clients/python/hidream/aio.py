"""The client for asyncio: `hidream.client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

from hidream.connection import DEFAULT_ADDRESS, SERVICE_NAME, Tls, call_metadata, channel_options
from hidream.downloads import Download
from hidream.errors import EventLoopError, translated_errors
from hidream.events import Event, EventReader, ImageFinished
from hidream.health import HealthStatus, ServingWait, health_request, health_status
from hidream.images import Image
from hidream.reconnecting import DEFAULT_POLICY, ReconnectPolicy, ResumableStream
from hidream.requests import (
    NO_LABELS,
    GenerateOptions,
    JobStateName,
    SubmitOptions,
    generate_request,
    list_request,
    submit_request,
    watch_jobs_request,
)
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2, server_info_pb2
from hidream.v1.image_gen_pb2_grpc import ImageGenStub
from hidream.watching import AllJobsWatch, JobChange, JobWatch

if TYPE_CHECKING:
    # Only the types tell the awaited stub from the other one.
    from hidream.v1.image_gen_pb2_grpc import ImageGenAsyncStub

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")
_ItemT = TypeVar("_ItemT")


class _Connection:
    """A channel, and the event loop that it belongs to from its creation on."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.loop = asyncio.get_running_loop()
        options = channel_options(tls)
        self.channel = (
            grpc.aio.secure_channel(address, tls.credentials(), options)
            if tls
            else grpc.aio.insecure_channel(address, options)
        )
        self.image_gen = ImageGenStub(self.channel)
        self.health = HealthStub(self.channel)


class AsyncClient:
    """One connection to a server, of one event loop. Close it, or use it in an `async with`.

    It may be made where no event loop runs, as at the top of a module: it belongs to the loop of its first
    call. A call in another loop raises EventLoopError, until the first loop, or the client in it, was closed;
    then it connects anew. Arguments, results and other errors are those of `hidream.client.Client`.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, token: str | None = None, tls: Tls | None = None
    ) -> None:
        self._address = address
        self._tls = tls
        self._metadata = call_metadata(token)
        self._connection: _Connection | None = None

    @property
    def _image_gen(self) -> ImageGenAsyncStub:
        return self._connected().image_gen

    @property
    def _health(self) -> HealthStub:
        return self._connected().health

    def _connected(self) -> _Connection:
        """The connection of the running loop, opened by its first call."""
        if self._connection is None or self._connection.loop.is_closed():
            # Calls of a loop that was closed have ended with it; the channel is closed when it is dropped.
            self._connection = _Connection(self._address, self._tls)
        elif self._connection.loop is not asyncio.get_running_loop():
            raise EventLoopError
        return self._connection

    async def close(self) -> None:
        """Close the connection; calls that are under way are cancelled. May be called twice."""
        if self._connection is not None:
            connection, self._connection = self._connected(), None
            await connection.channel.close()

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

    async def submit(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[SubmitOptions]
    ) -> job_pb2.Job:
        """As `Client.submit`."""
        request = submit_request(prompt, **options)
        with translated_errors():
            return await self._image_gen.SubmitJob(request, timeout=timeout_seconds, metadata=self._metadata)

    async def batch(
        self,
        requests: Iterable[image_gen_pb2.SubmitJobRequest],
        *,
        timeout_seconds: float | None = None,
    ) -> list[job_pb2.Job]:
        """As `Client.batch`."""
        request = image_gen_pb2.BatchSubmitJobsRequest(requests=requests)
        with translated_errors():
            answer = await self._image_gen.BatchSubmitJobs(
                request, timeout=timeout_seconds, metadata=self._metadata
            )
        return list(answer.jobs)

    async def status(self, job_id: str, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """As `Client.status`."""
        request = image_gen_pb2.GetJobRequest(job_id=job_id)
        with translated_errors():
            return await self._image_gen.GetJob(request, timeout=timeout_seconds, metadata=self._metadata)

    async def list_page(
        self,
        *,
        states: Iterable[JobStateName] = (),
        labels: Mapping[str, str] = NO_LABELS,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> image_gen_pb2.ListJobsResponse:
        """As `Client.list_page`."""
        request = list_request(states, labels, page_size, page_token)
        with translated_errors():
            return await self._image_gen.ListJobs(request, timeout=timeout_seconds, metadata=self._metadata)

    async def list_jobs(
        self, *, states: Iterable[JobStateName] = (), labels: Mapping[str, str] = NO_LABELS
    ) -> AsyncGenerator[job_pb2.Job]:
        """As `Client.list_jobs`."""
        states = tuple(states)
        page = await self.list_page(states=states, labels=labels)
        for job in page.jobs:
            yield job
        while page.next_page_token:
            page = await self.list_page(states=states, labels=labels, page_token=page.next_page_token)
            for job in page.jobs:
                yield job

    def watch(self, job_id: str, policy: ReconnectPolicy = DEFAULT_POLICY) -> AsyncGenerator[Event]:
        """As `Client.watch`."""
        return self._resuming(lambda: self._image_gen.WatchJob, JobWatch(job_id, policy))

    def watch_all(
        self,
        *,
        states: Iterable[JobStateName] = (),
        labels: Mapping[str, str] = NO_LABELS,
        policy: ReconnectPolicy = DEFAULT_POLICY,
    ) -> AsyncGenerator[JobChange]:
        """As `Client.watch_all`."""
        request = watch_jobs_request(states, labels)
        return self._resuming(lambda: self._image_gen.WatchJobs, AllJobsWatch(request, policy))

    async def cancel(self, job_id: str, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """As `Client.cancel`."""
        request = image_gen_pb2.CancelJobRequest(job_id=job_id)
        with translated_errors():
            return await self._image_gen.CancelJob(request, timeout=timeout_seconds, metadata=self._metadata)

    async def delete(self, job_id: str, *, timeout_seconds: float | None = None) -> None:
        """As `Client.delete`."""
        request = image_gen_pb2.DeleteJobRequest(job_id=job_id)
        with translated_errors():
            await self._image_gen.DeleteJob(request, timeout=timeout_seconds, metadata=self._metadata)

    async def download(
        self, job_id: str, path: Path, image_index: int = 0, policy: ReconnectPolicy = DEFAULT_POLICY
    ) -> image_pb2.ImageInfo:
        """As `Client.download`."""
        job = await self.status(job_id, timeout_seconds=policy.timeout_seconds)
        with Download(job, image_index, path, policy) as download:
            async for _ in self._resuming(lambda: self._image_gen.DownloadImage, download):
                pass
            return download.save()

    async def _resuming(
        self,
        method: Callable[[], grpc.aio.UnaryStreamMultiCallable[_RequestT, _ResponseT]],
        stream: ResumableStream[_RequestT, _ResponseT, _ItemT],
    ) -> AsyncGenerator[_ItemT]:
        while not stream.is_over:
            call = method()(stream.request(), timeout=stream.timeout_seconds(), metadata=self._metadata)
            try:
                async for response in call:
                    stream.answered()
                    item = stream.read(response)
                    if item is not None:
                        yield item
                stream.ended()
            except grpc.RpcError as error:
                await asyncio.sleep(stream.retry_delay_seconds(error))
            finally:
                call.cancel()

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
