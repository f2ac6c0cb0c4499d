"""The ImageGen service: check, call, convert, return."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeAlias

import grpc.aio

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, server_info_pb2
from hidream_grpc.errors import TooManyReadersError
from hidream_grpc.jobs.events import Cancelled, Failed, ImagePart, JobEvent
from hidream_grpc.jobs.job import CancelReason
from hidream_grpc.jobs.service import JobService
from hidream_grpc.server import convert
from hidream_grpc.server.call import current_call
from hidream_grpc.server.validation import RequestValidator

# Text: only the stubs know the class as generic.
Context: TypeAlias = "grpc.aio.ServicerContext[image_gen_pb2.GenerateRequest, image_gen_pb2.GenerateResponse]"
InfoContext: TypeAlias = (
    "grpc.aio.ServicerContext[image_gen_pb2.GetServerInfoRequest, server_info_pb2.ServerInfo]"
)


class ImageGenServicer(image_gen_pb2_grpc.ImageGenServicer):
    """`hidream.v1.ImageGen`; RPCs that are not here answer UNIMPLEMENTED from the generated base."""

    def __init__(
        self,
        jobs: JobService,
        validator: RequestValidator,
        max_streams: int,
        describe_server: Callable[[], server_info_pb2.ServerInfo],
    ) -> None:
        self._jobs = jobs
        self._validator = validator
        self._max_streams = max_streams
        self._num_streams = 0
        self._describe_server = describe_server

    async def Generate(  # noqa: N802
        self, request: image_gen_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[image_gen_pb2.GenerateResponse]:
        """Submit a job and follow it; when its last caller leaves it is cancelled, unless it is detached."""
        if self._num_streams >= self._max_streams:
            raise TooManyReadersError(self._max_streams, self._jobs.retry_after_seconds)
        call = current_call()
        submission = self._validator.submission(
            request, caller=call.caller, deadline_seconds=context.time_remaining()
        )
        call.request_id = submission.request_id
        job = self._jobs.submit(submission, call.owner)
        call.job_id = job.job_id
        self._num_streams += 1
        try:
            async with aclosing(self._jobs.follow(job.job_id)) as events:
                async for event in events:
                    if isinstance(event.body, Failed | Cancelled):
                        raise event.body.error
                    yield await self._response(job.job_id, event)
        finally:
            self._num_streams -= 1
            # A caller who tries again follows the same job while its first call is not yet known to be lost.
            if not submission.is_detached and not self._jobs.has_readers(job.job_id):
                is_late = call.deadline_has_passed
                self._jobs.cancel(job.job_id, CancelReason.DEADLINE if is_late else CancelReason.CALLER_LEFT)

    async def _response(self, job_id: str, event: JobEvent) -> image_gen_pb2.GenerateResponse:
        data = b""
        if isinstance(part := event.body, ImagePart):
            data = await self._jobs.read_image(job_id, part.image.index, part.offset, part.length)
        return image_gen_pb2.GenerateResponse(job_id=job_id, event=convert.job_event(event, data))

    async def GetServerInfo(  # noqa: N802
        self, request: image_gen_pb2.GetServerInfoRequest, context: InfoContext
    ) -> server_info_pb2.ServerInfo:
        """Describe the server as it is now."""
        return self._describe_server()
