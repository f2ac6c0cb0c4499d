"""The ImageGen service: check, call, convert, return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf import empty_pb2

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2, server_info_pb2
from hidream_grpc.jobs.artifacts.image_reader import ImageReader
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.service import JobService
from hidream_grpc.jobs.watching.changed_jobs import JobChange
from hidream_grpc.jobs.watching.events import Cancelled, Failed, ImagePart, JobEvent
from hidream_grpc.server import convert
from hidream_grpc.server.call import current_call
from hidream_grpc.server.checks.jobs import (
    checked_download,
    checked_filter,
    checked_job_id,
    checked_query,
    checked_watch,
    finished_image,
)
from hidream_grpc.server.checks.requests import RequestChecks
from hidream_grpc.server.checks.submissions import reconnect_window_seconds
from hidream_grpc.server.streams import OpenStreams, SharedMessages

# Text: only the stubs know the class as generic.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

JOBS_PER_TURN = 50
"""Number of jobs of a page that become messages before other calls have their turn: 3 ms."""


class ImageGenServicer(image_gen_pb2_grpc.ImageGenServicer):
    """The servicer of `hidream.v1.ImageGen`."""

    def __init__(
        self,
        jobs: JobService,
        checks: RequestChecks,
        limits: RequestLimits,
        describe_server: Callable[[], server_info_pb2.ServerInfo],
    ) -> None:
        self._jobs = jobs
        self._checks = checks
        self._limits = limits
        self._streams = OpenStreams(limits.max_streams, limits.max_streams_per_caller)
        self._describe_server = describe_server
        self._shared_messages = SharedMessages(self._change_message)

    async def Generate(  # noqa: N802
        self, request: image_gen_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[image_gen_pb2.GenerateResponse]:
        """Submit a job and follow it; when its last caller leaves it is cancelled, unless it is detached."""
        with self._stream():
            call = current_call()
            checked = await self._checks.one(request, call.caller, context.time_remaining())
            (submission,) = checked.submissions
            call.request_id = submission.request_id
            # A retry that is refused as a new job may still name a window that no check has seen.
            window_seconds = 0.0 if checked.refusal else reconnect_window_seconds(request)
            attended = self._jobs.attended(
                submission, call.owner, checked.refusal, call.leaving_reason, window_seconds
            )
            async with attended as job:
                call.job_id = job.job_id
                reader = self._jobs.image_reader(job.job_id)
                async with aclosing(self._jobs.follow(call.owner, job.job_id)) as events:
                    async for event in events:
                        if isinstance(event.body, Failed | Cancelled):
                            raise event.body.error
                        message = await _message(event, reader)
                        yield image_gen_pb2.GenerateResponse(job_id=job.job_id, event=message)

    async def SubmitJob(  # noqa: N802
        self, request: image_gen_pb2.SubmitJobRequest, context: Context
    ) -> job_pb2.Job:
        """Queue a job."""
        call = current_call()
        checked = await self._checks.one(request, call.caller)
        (submission,) = checked.submissions
        call.request_id = submission.request_id
        job = await self._jobs.submit(submission, call.owner, refusal=checked.refusal)
        call.job_id = job.job_id
        return await self._job(job)

    async def BatchSubmitJobs(  # noqa: N802
        self, request: image_gen_pb2.BatchSubmitJobsRequest, context: Context
    ) -> image_gen_pb2.BatchSubmitJobsResponse:
        """Queue many jobs, or none."""
        call = current_call()
        checked = await self._checks.batch(request.requests, call.caller)
        jobs = await self._jobs.submit_all(checked.submissions, call.owner, refusal=checked.refusal)
        return image_gen_pb2.BatchSubmitJobsResponse(jobs=await self._shown(jobs))

    async def GetJob(  # noqa: N802
        self, request: image_gen_pb2.GetJobRequest, context: Context
    ) -> job_pb2.Job:
        """Return a job as it is now."""
        return await self._job(await self._jobs.get(self._owner(), checked_job_id(request)))

    async def ListJobs(  # noqa: N802
        self, request: image_gen_pb2.ListJobsRequest, context: Context
    ) -> image_gen_pb2.ListJobsResponse:
        """Return a page of jobs."""
        owner = self._owner()
        query = checked_query(request, owner, self._limits)
        page = await self._jobs.list(owner, query.states, query.labels, query.page_size, query.page_token)
        jobs = await self._shown(page.jobs)
        return image_gen_pb2.ListJobsResponse(jobs=jobs, next_page_token=page.next_page_token)

    async def WatchJob(  # noqa: N802
        self, request: image_gen_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[image_gen_pb2.WatchJobResponse]:
        """Follow a job from any point."""
        with self._stream():
            job_id, after_sequence = checked_watch(request)
            current_call().job_id = job_id
            reader = self._jobs.image_reader(job_id)
            async with aclosing(self._jobs.follow(self._owner(), job_id, after_sequence)) as events:
                async for event in events:
                    if request.without_images and isinstance(event.body, ImagePart):
                        continue
                    message = await _message(event, reader)
                    yield image_gen_pb2.WatchJobResponse(job_id=job_id, event=message)

    async def CancelJob(  # noqa: N802
        self, request: image_gen_pb2.CancelJobRequest, context: Context
    ) -> job_pb2.Job:
        """Cancel a job."""
        job_id = checked_job_id(request)
        return await self._job(await self._jobs.cancel(self._owner(), job_id, CancelReason.REQUESTED))

    async def DeleteJob(  # noqa: N802
        self, request: image_gen_pb2.DeleteJobRequest, context: Context
    ) -> empty_pb2.Empty:
        """Delete a job that has ended."""
        await self._jobs.delete(self._owner(), checked_job_id(request))
        return empty_pb2.Empty()

    async def DownloadImage(  # noqa: N802
        self, request: image_gen_pb2.DownloadImageRequest, context: Context
    ) -> AsyncIterator[image_gen_pb2.DownloadImageResponse]:
        """Read a finished image from an offset."""
        job_id, index, offset = checked_download(request)
        current_call().job_id = job_id
        with self._stream(), self._jobs.reading(job_id):
            image = finished_image(await self._jobs.get(self._owner(), job_id), index, offset)
            reader = self._jobs.image_reader(job_id)
            while offset < image.size_bytes:
                data = await reader.read(image, offset, self._limits.chunk_bytes)
                chunk = image_pb2.ImageChunk(image=convert.image_info(image), offset=offset, data=data)
                yield image_gen_pb2.DownloadImageResponse(chunk=chunk)
                offset += len(data)

    async def WatchJobs(  # noqa: N802
        self, request: image_gen_pb2.WatchJobsRequest, context: Context
    ) -> AsyncIterator[image_gen_pb2.WatchJobsResponse]:
        """Follow the states of many jobs."""
        with self._stream():
            query = checked_filter(request, self._limits)
            changes = self._jobs.follow_all(self._owner(), query.states, query.labels)
            async with aclosing(changes) as matching:
                async for change in matching:
                    yield await self._shared_messages.of(change)

    async def GetServerInfo(  # noqa: N802
        self, request: image_gen_pb2.GetServerInfoRequest, context: Context
    ) -> server_info_pb2.ServerInfo:
        """Describe the server as it is now."""
        await self._jobs.refresh_counts()
        return self._describe_server()

    async def _change_message(self, change: JobChange) -> image_gen_pb2.WatchJobsResponse:
        return image_gen_pb2.WatchJobsResponse(
            job=await self._job(change.job), change_time=convert.timestamp(change.time)
        )

    def _owner(self) -> str:
        return current_call().owner

    def _stream(self) -> AbstractContextManager[None]:
        return self._streams.opened(current_call().caller, self._jobs.retry_after_seconds)

    async def _shown(self, jobs: Sequence[Job]) -> list[job_pb2.Job]:
        shown: list[job_pb2.Job] = []
        for job, position in zip(jobs, await self._jobs.queue_positions(jobs), strict=True):
            if shown and len(shown) % JOBS_PER_TURN == 0:
                await asyncio.sleep(0)
            shown.append(convert.job(job, position))
        return shown

    async def _job(self, job: Job) -> job_pb2.Job:
        (shown,) = await self._shown([job])
        return shown


async def _message(event: JobEvent, reader: ImageReader) -> job_pb2.JobEvent:
    data = b""
    if isinstance(part := event.body, ImagePart):
        data = await reader.read(part.image, part.offset, part.length)
    return convert.job_event(event, data)
