"""The client for asyncio. `scripts/generate` derives `hidream.client` from this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Self, TypeVar, Unpack

import grpc

from hidream.addresses import endpoint
from hidream.connection import DEFAULT_ADDRESS, SERVICE_NAME, AsyncConnection, Tls, call_metadata
from hidream.downloads import Download
from hidream.errors import translated_errors
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
from hidream.watching import AllJobsWatch, JobChange, JobWatch

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")
_ItemT = TypeVar("_ItemT")


class AsyncClient:
    """One connection to a server. Tasks may share it; close it, or use it in `async with`.

    With asyncio: it may be made where no event loop runs, as at the top of a module, and belongs to the
    loop of its first call. A call in another loop raises EventLoopError, until the first loop, or the
    client in it, was closed; then it connects anew.

    Every method raises the errors of `hidream.errors`. `timeout_seconds` is the deadline of the
    whole call, which travels to the server; None is none.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, token: str | None = None, tls: Tls | None = None
    ) -> None:
        """Connects when it is first used.

        Args:
            address: `host`, `host:port`, an `http://` or `https://` URL without a path, or any other target
                that gRPC knows. Without a port it means 8088, or 443 behind `https://`, which implies `tls`.
            token: bearer token, for servers that ask for one. Without `tls` it travels unencrypted.
            tls: encrypts the connection.

        Raises:
            AddressError: the address is none of these.
        """
        self._connection = AsyncConnection(*endpoint(address, tls))
        self._metadata = call_metadata(token)

    async def close(self) -> None:
        """Close the connection; calls that are under way are cancelled. May be called twice."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Event]:
        """Draw images and follow the job: every event as it happens, `Succeeded` last.

        The call starts with the first event that is asked for. Closing the generator, or leaving
        it, cancels the call, and so the job unless `detached` is set.

        With asyncio: cancelling the task that waits for an event cancels the call too. Code that leaves early
        and goes on closes the generator, by `aclose()` or `contextlib.aclosing`: Python closes an abandoned
        asynchronous generator only some time later.

        Raises:
            ServerError: the request was refused, or the job failed.
            StreamError: the images did not arrive as they were sent.
        """
        return self._follow(generate_request(prompt, **options), timeout_seconds)

    async def _follow(
        self, request: image_gen_pb2.GenerateRequest, timeout_seconds: float | None
    ) -> AsyncGenerator[Event]:
        reader = EventReader()
        with translated_errors():
            call = self._connection.image_gen.Generate(
                request, timeout=timeout_seconds, metadata=self._metadata
            )
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
        """Draw images and wait for them, in the order of their index. Raises what `generate` does."""
        events = self.generate(prompt, timeout_seconds=timeout_seconds, **options)
        images = [event.image async for event in events if isinstance(event, ImageFinished)]
        return sorted(images, key=lambda image: image.index)

    async def submit(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[SubmitOptions]
    ) -> job_pb2.Job:
        """Queue a job and return it at once. What was returned survives a restart of the server."""
        request = submit_request(prompt, **options)
        with translated_errors():
            return await self._connection.image_gen.SubmitJob(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def batch(
        self,
        requests: Iterable[image_gen_pb2.SubmitJobRequest],
        *,
        timeout_seconds: float | None = None,
    ) -> list[job_pb2.Job]:
        """Queue many jobs, all or none, and return them in the order of the requests.

        Args:
            requests: made by `hidream.requests.submit_request`.
            timeout_seconds: deadline of the call; None is none.

        Raises:
            InvalidArgumentError: the fields of its violations begin with `requests[i].`.
        """
        request = image_gen_pb2.BatchSubmitJobsRequest(requests=requests)
        with translated_errors():
            answer = await self._connection.image_gen.BatchSubmitJobs(
                request, timeout=timeout_seconds, metadata=self._metadata
            )
        return list(answer.jobs)

    async def status(self, job_id: str, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """Return a job as it is now."""
        request = image_gen_pb2.GetJobRequest(job_id=job_id)
        with translated_errors():
            return await self._connection.image_gen.GetJob(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def list_page(
        self,
        *,
        states: Iterable[JobStateName] = (),
        labels: Mapping[str, str] = NO_LABELS,
        page_size: int = 0,
        page_token: str = "",
        timeout_seconds: float | None = None,
    ) -> image_gen_pb2.ListJobsResponse:
        """Return one page of the caller's jobs, newest first.

        Args:
            states: only jobs in one of these; empty is all.
            labels: only jobs that carry all of these, with these values.
            page_size: 0 is the server's default.
            page_token: `next_page_token` of the page before.
            timeout_seconds: deadline of the call; None is none.
        """
        request = list_request(states, labels, page_size, page_token)
        with translated_errors():
            return await self._connection.image_gen.ListJobs(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def list_jobs(
        self, *, states: Iterable[JobStateName] = (), labels: Mapping[str, str] = NO_LABELS
    ) -> AsyncGenerator[job_pb2.Job]:
        """Yield all of the caller's jobs that match, newest first; pages are fetched as they are read."""
        states = tuple(states)
        page = await self.list_page(states=states, labels=labels)
        for job in page.jobs:
            yield job
        while page.next_page_token:
            page = await self.list_page(states=states, labels=labels, page_token=page.next_page_token)
            for job in page.jobs:
                yield job

    def watch(self, job_id: str, policy: ReconnectPolicy = DEFAULT_POLICY) -> AsyncGenerator[Event]:
        """Follow a job to its end: the same events as `generate`, from its current state on.

        When the connection is lost, or the server restarts, the stream goes on behind the last event: nothing
        that matters is missed, and nothing comes twice. Leaving the stream does not touch the job.

        Raises:
            ServerError: there is no such job, it failed or was cancelled, or no server answered for
                `policy.reconnect_seconds`.
            StreamError: the images did not arrive as they were sent.
        """
        return self._resuming(lambda: self._connection.image_gen.WatchJob, JobWatch(job_id, policy))

    def watch_all(
        self,
        *,
        states: Iterable[JobStateName] = (),
        labels: Mapping[str, str] = NO_LABELS,
        policy: ReconnectPolicy = DEFAULT_POLICY,
    ) -> AsyncGenerator[JobChange]:
        """Yield every change of state of the caller's jobs, those that match now first, without end.

        Args:
            states: only jobs in one of these, and those that leave them; empty is all.
            labels: only jobs that carry all of these, with these values.
            policy: what to do when the connection is lost.
        """
        request = watch_jobs_request(states, labels)
        return self._resuming(lambda: self._connection.image_gen.WatchJobs, AllJobsWatch(request, policy))

    async def cancel(self, job_id: str, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """Stop a job at its next step, and return it as it is then; one that has ended stays as it is."""
        request = image_gen_pb2.CancelJobRequest(job_id=job_id)
        with translated_errors():
            return await self._connection.image_gen.CancelJob(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def delete(self, job_id: str, *, timeout_seconds: float | None = None) -> None:
        """Delete a job that has ended, and its images; FailedPreconditionError if it has not."""
        request = image_gen_pb2.DeleteJobRequest(job_id=job_id)
        with translated_errors():
            await self._connection.image_gen.DeleteJob(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def download(
        self, job_id: str, path: Path, image_index: int = 0, policy: ReconnectPolicy = DEFAULT_POLICY
    ) -> image_pb2.ImageInfo:
        """Write one finished image into a file, which appears whole or not at all.

        What arrived before the connection was lost, or the process ended, is kept beside the file
        and not asked for again, unless the server has lost the image. The SHA-256 is checked at the end.

        Raises:
            ServerError: there is no such image, it is not finished (FailedPreconditionError), or no
                server answered for `policy.reconnect_seconds`.
            BrokenImageError: the bytes are not those announced.
            OSError: the file cannot be written.
        """
        job = await self.status(job_id, timeout_seconds=policy.timeout_seconds)
        with Download(job, image_index, path, policy) as download:
            async for _ in self._resuming(lambda: self._connection.image_gen.DownloadImage, download):
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
        """Describe the server: model, devices, load, versions, defaults and every limit."""
        request = image_gen_pb2.GetServerInfoRequest()
        with translated_errors():
            return await self._connection.image_gen.GetServerInfo(
                request, timeout=timeout_seconds, metadata=self._metadata
            )

    async def health(
        self, *, timeout_seconds: float | None = None, service: str = SERVICE_NAME
    ) -> HealthStatus:
        """Say whether the server takes requests; `service` "" asks for the server as a whole."""
        with translated_errors():
            return health_status(
                await self._connection.health.Check(
                    health_request(service), timeout=timeout_seconds, metadata=self._metadata
                )
            )

    async def wait_until_serving(self, timeout_seconds: float, *, service: str = SERVICE_NAME) -> None:
        """Return as soon as the server takes requests; it may not even have started yet.

        Raises:
            NotServingError: it did not in this time.
        """
        wait = ServingWait(timeout_seconds)
        while True:
            call = self._connection.health.Watch(
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
