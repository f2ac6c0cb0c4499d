"""The client for asyncio. `scripts/generate` derives `hidream.client` from this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar, Unpack

import grpc

from hidream.addresses import endpoint
from hidream.connection import (
    DEFAULT_ADDRESS,
    DEFAULT_KEEPALIVE_SECONDS,
    SERVICE_NAME,
    AsyncConnection,
    Tls,
    call_metadata,
)
from hidream.downloads import Download
from hidream.errors import ServerError, error_from_call
from hidream.events import Event, ImageFinished
from hidream.health import HealthStatus, ServingWait, health_request, health_status
from hidream.images import Image
from hidream.reconnecting import DEFAULT_POLICY, FirstAnswer, ReconnectPolicy, ResumableStream
from hidream.requests import (
    NO_LABELS,
    GenerateOptions,
    JobStateName,
    SubmitOptions,
    generate_request,
    list_request,
    submit_request,
    watch_jobs_request,
    with_request_id,
)
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2, server_info_pb2
from hidream.watching import AllJobsWatch, JobChange, JobGeneration, JobWatch

DEFAULT_TIMEOUT_SECONDS = 30.0
LEAVE_TIMEOUT_SECONDS = 5.0

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")
_ItemT = TypeVar("_ItemT")


class AsyncClient:
    """One connection to a server. Tasks may share it; close it, or use it in `async with`.

    With asyncio: it may be made where no event loop runs, as at the top of a module, and belongs to the
    loop of its first call. A call in another loop raises EventLoopError, until the first loop, or the
    client in it, was closed; then it connects anew.

    Every method raises the errors of `hidream.errors`. `timeout_seconds` is the deadline of the
    whole call, which travels to the server; None is that of the client for calls with one answer, and
    none for streams. A call that is UNAVAILABLE for as long as the server says is tried twice more.

    Attributes:
        address: where the server is.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
        keepalive_seconds: float = DEFAULT_KEEPALIVE_SECONDS,
    ) -> None:
        """Connects when it is first used.

        Args:
            address: `host`, `host:port`, an `http://` or `https://` URL without a path, or any other target
                that gRPC knows. Without a port it means 8088, or 443 behind `https://`, which implies `tls`.
            token: bearer token, for servers that ask for one. Without `tls` it travels unencrypted.
            tls: encrypts the connection.
            timeout_seconds: deadline of every call with one answer that names no other; None is none.
            keepalive_seconds: a server that is silent for so long is asked whether it lives, and lost when it
                says nothing for as long again. It must allow so many pings: 5 s at least, where nothing else
                is sent.

        Raises:
            AddressError: the address is none of these.
        """
        self.address = address
        self._connection = AsyncConnection(*endpoint(address, tls), keepalive_seconds)
        self._metadata = call_metadata(token)
        self._timeout_seconds = timeout_seconds
        self._held_job_ids: set[str] = set()

    async def close(self) -> None:
        """Close the connection; calls that are under way are cancelled. May be called twice."""
        for job_id in tuple(self._held_job_ids):
            await self._leave(job_id)
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(
        self,
        prompt: str,
        *,
        timeout_seconds: float | None = None,
        policy: ReconnectPolicy = DEFAULT_POLICY,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Event]:
        """Draw images and follow the job: every event as it happens, `Succeeded` last.

        The call starts with the first event that is asked for. Closing the generator, or leaving
        it, cancels the call, and so the job unless `detached` is set.

        When the connection is lost, or the server restarts, the call is made again and goes on behind the
        last event of the same job, as `watch` does. A job that the server has given up meanwhile is drawn
        anew.

        With asyncio: cancelling the task that waits for an event cancels the call too. Code that leaves early
        and goes on closes the generator, by `aclose()` or `contextlib.aclosing`: Python closes an abandoned
        asynchronous generator only some time later.

        Raises:
            ServerError: the request was refused, the job failed, or no server answered for
                `policy.reconnect_seconds`; then the error names the job.
            StreamError: the images did not arrive as they were sent.
        """
        if timeout_seconds is not None:
            policy = replace(policy, timeout_seconds=timeout_seconds)
        return self._generate(JobGeneration(generate_request(prompt, **options), policy))

    async def _generate(self, stream: JobGeneration) -> AsyncGenerator[Event]:
        try:
            async with aclosing(
                self._resuming(lambda: self._connection.image_gen.Generate, stream)
            ) as events:
                async for event in events:
                    if stream.held_job_id:
                        self._held_job_ids.add(stream.held_job_id)
                    yield event
        except ServerError:
            raise
        except BaseException:
            await self._leave(stream.held_job_id)
            raise
        finally:
            self._held_job_ids.discard(stream.job_id)

    async def _leave(self, job_id: str) -> None:
        """Stop a job that the server would hold for a caller whose connection is lost."""
        if job_id not in self._held_job_ids:
            return
        request = image_gen_pb2.CancelJobRequest(job_id=job_id)
        # A server that does not answer stops it itself, a little later.
        with suppress(grpc.RpcError):
            await self._connection.image_gen.CancelJob(
                request, timeout=LEAVE_TIMEOUT_SECONDS, metadata=self._metadata
            )
        # Not before: a client that is closed meanwhile says so too, where this call breaks off.
        self._held_job_ids.discard(job_id)

    async def draw(
        self,
        prompt: str,
        *,
        timeout_seconds: float | None = None,
        policy: ReconnectPolicy = DEFAULT_POLICY,
        **options: Unpack[GenerateOptions],
    ) -> list[Image]:
        """Draw images and wait for them, in the order of their index. Raises what `generate` does."""
        events = self.generate(prompt, timeout_seconds=timeout_seconds, policy=policy, **options)
        async with aclosing(events):
            images = {
                event.image.index: event.image async for event in events if isinstance(event, ImageFinished)
            }
        return [images[index] for index in sorted(images)]

    async def submit(
        self, prompt: str, *, timeout_seconds: float | None = None, **options: Unpack[SubmitOptions]
    ) -> job_pb2.Job:
        """Queue a job and return it at once. What was returned survives a restart of the server."""
        request = with_request_id(submit_request(prompt, **options))
        return await self._answer(self._connection.image_gen.SubmitJob, request, timeout_seconds)

    async def batch(
        self,
        requests: Iterable[image_gen_pb2.SubmitJobRequest],
        *,
        timeout_seconds: float | None = None,
    ) -> list[job_pb2.Job]:
        """Queue many jobs, all or none, and return them in the order of the requests.

        Args:
            requests: made by `hidream.requests.submit_request`.
            timeout_seconds: deadline of the call; None is that of the client.

        Raises:
            InvalidArgumentError: the fields of its violations begin with `requests[i].`.
        """
        request = image_gen_pb2.BatchSubmitJobsRequest(requests=map(with_request_id, requests))
        answer = await self._answer(self._connection.image_gen.BatchSubmitJobs, request, timeout_seconds)
        return list(answer.jobs)

    async def status(self, job_id: str, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """Return a job as it is now."""
        request = image_gen_pb2.GetJobRequest(job_id=job_id)
        return await self._answer(self._connection.image_gen.GetJob, request, timeout_seconds)

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
            timeout_seconds: deadline of the call; None is that of the client.
        """
        request = list_request(states, labels, page_size, page_token)
        return await self._answer(self._connection.image_gen.ListJobs, request, timeout_seconds)

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
        return await self._answer(self._connection.image_gen.CancelJob, request, timeout_seconds)

    async def delete(self, job_id: str, *, timeout_seconds: float | None = None) -> None:
        """Delete a job that has ended, and its images; FailedPreconditionError if it has not."""
        request = image_gen_pb2.DeleteJobRequest(job_id=job_id)
        await self._answer(self._connection.image_gen.DeleteJob, request, timeout_seconds)

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

    async def _answer(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _ResponseT],
        request: _RequestT,
        timeout_seconds: float | None,
    ) -> _ResponseT:
        first = FirstAnswer(self._timeout_seconds if timeout_seconds is None else timeout_seconds)
        while True:
            try:
                return await method(request, timeout=first.remaining_seconds(), metadata=self._metadata)
            except grpc.RpcError as error:
                await asyncio.sleep(first.retry_delay_seconds(self._error(error)))

    def _error(self, call: grpc.RpcError) -> ServerError:
        return error_from_call(call, self._connection.proxy)

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
                await asyncio.sleep(stream.retry_delay_seconds(self._error(error)))
            finally:
                call.cancel()

    async def info(self, *, timeout_seconds: float | None = None) -> server_info_pb2.ServerInfo:
        """Describe the server: model, devices, load, versions, defaults and every limit."""
        request = image_gen_pb2.GetServerInfoRequest()
        return await self._answer(self._connection.image_gen.GetServerInfo, request, timeout_seconds)

    async def health(
        self, *, timeout_seconds: float | None = None, service: str = SERVICE_NAME
    ) -> HealthStatus:
        """Say whether the server takes requests; `service` "" asks for the server as a whole."""
        check = self._connection.health.Check
        return health_status(await self._answer(check, health_request(service), timeout_seconds))

    async def wait_until_serving(self, timeout_seconds: float, *, service: str = SERVICE_NAME) -> None:
        """Return as soon as the server takes requests; it may not even have started yet.

        Raises:
            NotServingError: it did not in this time.
        """
        wait = ServingWait(timeout_seconds, self._connection.proxy)
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
                await asyncio.sleep(wait.retry_delay_seconds(self._error(error)))
            finally:
                call.cancel()
