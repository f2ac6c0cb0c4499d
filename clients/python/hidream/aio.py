"""The client for asyncio. `scripts/generate` derives `hidream.client` from this file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Self, TypeVar

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
from hidream.events import Event, ImageFinished, Succeeded
from hidream.health import HealthStatus, ServingWait, health_request, health_status
from hidream.images import Image
from hidream.reconnecting import DEFAULT_POLICY, FirstAnswer, ReconnectPolicy, ResumableStream
from hidream.requests import (
    NO_LABELS,
    JobOrId,
    JobStateName,
    OutputFormat,
    Priority,
    generate_request,
    job_id_of,
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
        self._generations: set[JobGeneration] = set()

    async def close(self) -> None:
        """Close the connection; calls that are under way are cancelled. May be called twice."""
        leaving = FirstAnswer(LEAVE_TIMEOUT_SECONDS)
        for stream in tuple(self._generations):
            await self._leave(stream, leaving)
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        output_format: OutputFormat | None = None,
        quality: int | None = None,
        request_id: str | None = None,
        preview: bool | None = None,
        priority: Priority | None = None,
        labels: Mapping[str, str] | None = None,
        model: str | None = None,
        detached: bool | None = None,
        timeout_seconds: float | None = None,
        policy: ReconnectPolicy = DEFAULT_POLICY,
    ) -> AsyncGenerator[Event]:
        """Draw images and follow the job: every event as it happens, `Succeeded` last.

        The call starts with the first event that is asked for. Closing the generator, or leaving
        it, cancels the call, and so the job unless `detached` is set.

        When the connection is lost, or the server restarts, the call is made again and goes on behind the
        last event of the same job, as `watch` does. The server holds the job for 30 s after it has noticed,
        and for no time with a `request_id`, which others may wait for too; a job that it has given up is
        generated anew. Leaving while the connection is lost cancels nothing: until then the same call, with
        the `followed_request_id` of the error as its `request_id`, goes on with the job.

        With asyncio: cancelling the task that waits for an event cancels the call too. Code that leaves early
        and goes on closes the generator, by `aclose()` or `contextlib.aclosing`: Python closes an abandoned
        asynchronous generator only some time later.

        Args:
            prompt: what to generate.
            negative_prompt: what to keep away from; works through guidance.
            width, height: in pixels; both or neither.
            num_inference_steps: denoising steps.
            guidance_scale: how closely to follow the prompt; 1 or less is none, in half the time, and gives
                poor images of a model that is trained with guidance, such as Full.
            num_images: number of images; image i is generated from seed + i.
            seed: seed of image 0; the server picks one when absent, and `Started.spec` says which.
            output_format: file format of the images.
            quality: quality of JPEG and WebP, 1 to 100.
            request_id: a name for this request, so that a retry does not draw twice.
            preview: also send a small preview of image 0 after each step.
            priority: which jobs go first when several wait.
            labels: free labels, to find the job again.
            model: which one generates, one of `info().live_models`; the server's own when absent.
            detached: let the job go on when the call ends early.
            timeout_seconds: deadline of the whole call; None is none.
            policy: what to do when the connection is lost.

        Raises:
            ServerError: the request was refused, the job failed, or no server answered for
                `policy.reconnect_seconds`; then the error names the job and the request id.
            StreamError: the images did not arrive as they were sent.
        """
        if timeout_seconds is not None:
            policy = replace(policy, timeout_seconds=timeout_seconds)
        request = generate_request(
            prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images=num_images,
            seed=seed,
            output_format=output_format,
            quality=quality,
            request_id=request_id,
            preview=preview,
            priority=priority,
            labels=labels,
            model=model,
            detached=detached,
        )
        return self._generate(JobGeneration(request, policy))

    async def _generate(self, stream: JobGeneration) -> AsyncGenerator[Event]:
        self._generations.add(stream)
        try:
            async with aclosing(
                self._resuming(lambda: self._connection.image_gen.Generate, stream)
            ) as events:
                async for event in events:
                    yield event
        except ServerError:
            raise
        except BaseException:
            await self._leave(stream, FirstAnswer(LEAVE_TIMEOUT_SECONDS))
            raise
        finally:
            self._generations.discard(stream)

    async def _leave(self, stream: JobGeneration, leaving: FirstAnswer) -> None:
        """Stop a job that the server would hold for a caller whose connection is lost."""
        if stream not in self._generations or not stream.held_job_id:
            return
        request = image_gen_pb2.CancelJobRequest(job_id=stream.held_job_id)
        # A server that does not answer stops it itself, a little later.
        with suppress(grpc.RpcError):
            await self._connection.image_gen.CancelJob(
                request, timeout=leaving.remaining_seconds(), metadata=self._metadata
            )
        # Not before: a client that is closed meanwhile says so too, where this call breaks off.
        self._generations.discard(stream)

    async def draw(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        output_format: OutputFormat | None = None,
        quality: int | None = None,
        request_id: str | None = None,
        preview: bool | None = None,
        priority: Priority | None = None,
        labels: Mapping[str, str] | None = None,
        model: str | None = None,
        detached: bool | None = None,
        timeout_seconds: float | None = None,
        policy: ReconnectPolicy = DEFAULT_POLICY,
    ) -> list[Image]:
        """Draw images and wait for them, in the order of their index. Raises what `generate` does."""
        events = self.generate(
            prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images=num_images,
            seed=seed,
            output_format=output_format,
            quality=quality,
            request_id=request_id,
            preview=preview,
            priority=priority,
            labels=labels,
            model=model,
            detached=detached,
            timeout_seconds=timeout_seconds,
            policy=policy,
        )
        async with aclosing(events):
            images = {
                event.image.index: event.image async for event in events if isinstance(event, ImageFinished)
            }
        return [images[index] for index in sorted(images)]

    async def submit(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images: int | None = None,
        seed: int | None = None,
        output_format: OutputFormat | None = None,
        quality: int | None = None,
        request_id: str | None = None,
        preview: bool | None = None,
        priority: Priority | None = None,
        labels: Mapping[str, str] | None = None,
        model: str | None = None,
        timeout_seconds: float | None = None,
    ) -> job_pb2.Job:
        """Queue a job and return it at once. What was returned survives a restart of the server.

        The arguments are those of `generate`.
        """
        request = submit_request(
            prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images=num_images,
            seed=seed,
            output_format=output_format,
            quality=quality,
            request_id=request_id,
            preview=preview,
            priority=priority,
            labels=labels,
            model=model,
        )
        named = with_request_id(request)
        return await self._answer(self._connection.image_gen.SubmitJob, named, timeout_seconds)

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

    async def status(self, job: JobOrId, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """Return a job as it is now."""
        request = image_gen_pb2.GetJobRequest(job_id=job_id_of(job))
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

    def watch(self, job: JobOrId, policy: ReconnectPolicy = DEFAULT_POLICY) -> AsyncGenerator[Event]:
        """Follow a job to its end: the same events as `generate`, from its current state on.

        When the connection is lost, or the server restarts, the stream goes on behind the last event: nothing
        that matters is missed, and nothing comes twice. Leaving the stream does not touch the job.

        Raises:
            ServerError: there is no such job, it failed or was cancelled, or no server answered for
                `policy.reconnect_seconds`.
            StreamError: the images did not arrive as they were sent.
        """
        return self._resuming(lambda: self._connection.image_gen.WatchJob, JobWatch(job_id_of(job), policy))

    async def wait(self, job: JobOrId, policy: ReconnectPolicy = DEFAULT_POLICY) -> job_pb2.Job:
        """Return a job as it is when it has succeeded; its images stay on the server.

        Lost connections and restarts of the server are waited for, as by `watch`; raises what that does.
        """
        stream = JobWatch(job_id_of(job), policy, has_images=False)
        ended = job_pb2.Job()
        async for event in self._resuming(lambda: self._connection.image_gen.WatchJob, stream):
            if isinstance(event, Succeeded):
                ended = event.job
        return ended

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

    async def cancel(self, job: JobOrId, *, timeout_seconds: float | None = None) -> job_pb2.Job:
        """Stop a job at its next step, and return it as it is then; one that has ended stays as it is."""
        request = image_gen_pb2.CancelJobRequest(job_id=job_id_of(job))
        return await self._answer(self._connection.image_gen.CancelJob, request, timeout_seconds)

    async def delete(self, job: JobOrId, *, timeout_seconds: float | None = None) -> None:
        """Delete a job that has ended, and its images; FailedPreconditionError if it has not."""
        request = image_gen_pb2.DeleteJobRequest(job_id=job_id_of(job))
        await self._answer(self._connection.image_gen.DeleteJob, request, timeout_seconds)

    async def download(
        self,
        job: JobOrId,
        path: str | os.PathLike[str],
        image_index: int = 0,
        policy: ReconnectPolicy = DEFAULT_POLICY,
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
        now = await self.status(job, timeout_seconds=policy.timeout_seconds)
        with Download(now, image_index, Path(path), policy) as download:
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
