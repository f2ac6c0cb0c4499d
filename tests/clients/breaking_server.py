"""A real gRPC server with one finished job, whose streams break off where a test says.

It stands in for a server that restarts, so that every place where a stream can break is tried; that
the real one does so too is shown by tests/failure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2

JOB_ID = "job-1"
FILE = bytes(range(256)) * 4
CHUNK_BYTES = 100

Chunks = list[image_pb2.ImageChunk]


@dataclass
class BreakingImageGen(image_gen_pb2_grpc.ImageGenServicer):
    """One job with one image.

    Attributes:
        breaks: how many messages each call sends before it breaks off, first call first; calls
            beyond these send everything.
        code: the status with which a call breaks off.
        status: the same, with details, where a test wants them.
        sha256: of the image, as it is announced.
        damage: what becomes of the pieces of the image on their way.
        starts: `after_sequence` or `offset` of each call so far.
        generated: the requests of `Generate` so far.
        job_ids: the job of each call of `Generate`, first call first; of calls beyond these, JOB_ID.
        submitted: the request ids of `SubmitJob` so far.
        num_busy: how many of the next submissions are refused until a little later.
        cancelled: the jobs of `CancelJob` so far.
    """

    breaks: list[int] = field(default_factory=list)
    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    status: status_pb2.Status | None = None
    sha256: bytes = hashlib.sha256(FILE).digest()
    damage: Callable[[Chunks], Chunks] = list
    starts: list[int] = field(default_factory=list)
    generated: list[image_gen_pb2.GenerateRequest] = field(default_factory=list)
    job_ids: list[str] = field(default_factory=list)
    submitted: list[str] = field(default_factory=list)
    num_busy: int = 0
    cancelled: list[str] = field(default_factory=list)

    @property
    def job(self) -> job_pb2.Job:
        info = image_pb2.ImageInfo(
            width=64, height=64, seed=7, mime_type="image/png", size_bytes=len(FILE), sha256=self.sha256
        )
        spec = image_pb2.ImageSpec(
            prompt="a", num_inference_steps=3, num_images=1, seed=7, output_format=image_pb2.OUTPUT_FORMAT_PNG
        )
        return job_pb2.Job(job_id=JOB_ID, state=job_pb2.JOB_STATE_SUCCEEDED, spec=spec, images=[info])

    def chunks(self, offset: int = 0) -> Chunks:
        [info] = self.job.images
        return self.damage(
            [
                image_pb2.ImageChunk(image=info, offset=start, data=FILE[start : start + CHUNK_BYTES])
                for start in range(offset, len(FILE), CHUNK_BYTES)
            ]
        )

    @property
    def events(self) -> list[job_pb2.JobEvent]:
        """Every event that the job had, with gaps between the sequences."""
        events = [
            job_pb2.JobEvent(queued=job_pb2.Queued(queue_position=1)),
            job_pb2.JobEvent(started=job_pb2.Started(spec=self.job.spec)),
            *(
                job_pb2.JobEvent(progress=job_pb2.JobProgress(step=step, total_steps=3))
                for step in range(1, 4)
            ),
            *(job_pb2.JobEvent(image_chunk=chunk) for chunk in self.chunks()),
            job_pb2.JobEvent(succeeded=job_pb2.Succeeded(job=self.job)),
        ]
        for number, event in enumerate(events, start=1):
            event.sequence = 10 * number
        return events

    def _until_break(self, messages: list[Any], context: Any) -> Iterator[Any]:
        num_sent = self.breaks.pop(0) if self.breaks else len(messages)
        yield from messages[:num_sent]
        if num_sent < len(messages):
            if self.status is not None:
                context.abort_with_status(rpc_status.to_status(self.status))
            context.abort(self.code, "the server is going away")

    def GetJob(self, request: image_gen_pb2.GetJobRequest, context: Any) -> job_pb2.Job:  # noqa: N802
        return self.job

    def SubmitJob(self, request: image_gen_pb2.SubmitJobRequest, context: Any) -> job_pb2.Job:  # noqa: N802
        self.submitted.append(request.request_id)
        if self.num_busy:
            self.num_busy -= 1
            refusal = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="the model is loading")
            retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=1_000_000))
            refusal.details.add().Pack(retry)
            context.abort_with_status(rpc_status.to_status(refusal))
        return self.job

    def CancelJob(self, request: image_gen_pb2.CancelJobRequest, context: Any) -> job_pb2.Job:  # noqa: N802
        self.cancelled.append(request.job_id)
        return self.job

    def Generate(self, request: image_gen_pb2.GenerateRequest, context: Any) -> Iterator[Any]:  # noqa: N802
        self.starts.append(0)
        self.generated.append(request)
        job_id = self.job_ids.pop(0) if self.job_ids else JOB_ID
        responses = [image_gen_pb2.GenerateResponse(job_id=job_id, event=event) for event in self.events]
        return self._until_break(responses, context)

    def WatchJob(self, request: image_gen_pb2.WatchJobRequest, context: Any) -> Iterator[Any]:  # noqa: N802
        self.starts.append(request.after_sequence)
        responses = [
            image_gen_pb2.WatchJobResponse(job_id=JOB_ID, event=event)
            for event in self.events
            if event.sequence > request.after_sequence
        ]
        return self._until_break(responses, context)

    def WatchJobs(self, request: image_gen_pb2.WatchJobsRequest, context: Any) -> Iterator[Any]:  # noqa: N802
        self.starts.append(0)
        states = [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED]
        # Every connection begins with the job as it is then.
        states = states[len(self.starts) - 1 :]
        jobs = [image_gen_pb2.WatchJobsResponse(job=job_pb2.Job(job_id=JOB_ID, state=s)) for s in states]
        return self._until_break(jobs, context)

    def DownloadImage(  # noqa: N802
        self, request: image_gen_pb2.DownloadImageRequest, context: Any
    ) -> Iterator[Any]:
        self.starts.append(request.offset)
        responses = [
            image_gen_pb2.DownloadImageResponse(chunk=chunk) for chunk in self.chunks(request.offset)
        ]
        return self._until_break(responses, context)


def breaking_image_gen() -> BreakingImageGen:
    """One that breaks off nowhere yet; RPCs that are not here answer UNIMPLEMENTED."""
    return BreakingImageGen()  # type: ignore[abstract]


@contextmanager
def serving(servicer: BreakingImageGen) -> Iterator[str]:
    """The address of a server with these answers while the block lasts."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        server = grpc.server(threads, options=(("grpc.so_reuseport", 0),))
        image_gen_pb2_grpc.add_ImageGenServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
