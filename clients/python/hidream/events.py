"""What happens to a job, as frozen values: the events of `Generate`.

Their `repr` is one line: messages of the contract and bytes are left out of it.
Times are in seconds and by the server's clock. What a field means in full stands in
`protos/hidream/v1/job.proto`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from hidream.errors import CancelledError, StreamError, error_from_status
from hidream.images import Image, ImageAssembler
from hidream.v1 import image_pb2, job_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """The fields of every event.

    Attributes:
        job_id: the server's name of the job.
        sequence: grows within the job, with gaps.
        time: when it happened.
    """

    job_id: str
    sequence: int
    time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(JobEvent):
    """The job waits; `queue_position` is 1 for the next. The event comes again when the position changes."""

    queue_position: int
    estimated_wait_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(JobEvent):
    """The job left the queue; `spec` has every field decided, the seed among them.

    Comes again, with `execution.attempt` 2 or more, when a server that went away gave the job back.
    """

    spec: image_pb2.ImageSpec = field(repr=False)
    execution: job_pb2.Execution = field(repr=False)
    queue_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(JobEvent):
    """A denoising step ended; its time was measured on the devices."""

    step: int
    total_steps: int
    step_seconds: float
    estimated_remaining_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview(JobEvent):
    """A small preview of the unfinished image 0 after a step; `data` is a file of `mime_type`."""

    step: int
    mime_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(JobEvent):
    """The rank group was lost, or the server ended; the job goes on after `resumed_from_step`."""

    attempt: int
    reason: str
    resumed_from_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFinished(JobEvent):
    """All bytes of an image have arrived, and their SHA-256 is right. Any image may be first."""

    image: Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Time that a job spent in each stage, measured by the server."""

    queue_seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    total_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Succeeded(JobEvent):
    """All images have arrived; this is the last event."""

    job: job_pb2.Job = field(repr=False)
    timings: Timings


Event = Queued | Started | Progress | Preview | Restarted | ImageFinished | Succeeded


class EventReader:
    """Turns the messages of one job's stream into events, whatever the transport."""

    def __init__(self, has_images: bool = True) -> None:
        """Read the first event next.

        Args:
            has_images: whether the stream carries the images.
        """
        self._has_images = has_images
        self._images = ImageAssembler()
        self._has_succeeded = False

    def read(self, job_id: str, message: job_pb2.JobEvent) -> Event | None:
        """The event of one message; None for a piece that completes no image.

        Raises:
            ServerError: the message says that the job failed or was cancelled.
            StreamError: the message cannot follow those before it; BrokenImageError for an image.
        """
        common: dict[str, Any] = {
            "job_id": job_id,
            "sequence": message.sequence,
            "time": message.time.ToDatetime(tzinfo=UTC),
        }
        match message.WhichOneof("event"):
            case "queued":
                return Queued(
                    queue_position=message.queued.queue_position,
                    estimated_wait_seconds=_optional_seconds(message.queued, "estimated_wait"),
                    **common,
                )
            case "started":
                return Started(
                    spec=message.started.spec,
                    execution=message.started.execution,
                    queue_seconds=_seconds(message.started.queue_duration),
                    **common,
                )
            case "progress":
                return Progress(
                    step=message.progress.step,
                    total_steps=message.progress.total_steps,
                    step_seconds=_seconds(message.progress.step_duration),
                    estimated_remaining_seconds=_optional_seconds(message.progress, "estimated_remaining"),
                    **common,
                )
            case "preview":
                preview = message.preview
                return Preview(step=preview.step, mime_type=preview.mime_type, data=preview.data, **common)
            case "restarted":
                return Restarted(
                    attempt=message.restarted.attempt,
                    reason=message.restarted.reason,
                    resumed_from_step=message.restarted.resumed_from_step,
                    **common,
                )
            case "image_chunk" if not self._has_images:
                return None  # from a server that cannot leave them out
            case "image_chunk":
                image = self._images.add(message.image_chunk)
                return ImageFinished(image=image, **common) if image else None
            case "succeeded":
                return self._succeeded(message.succeeded.job, common)
            case "failed":
                raise error_from_status(message.failed.status)
            case "cancelled":
                reason = job_pb2.CancelReason.Name(message.cancelled.reason)
                text = f"the job was cancelled: {reason}"
                raise CancelledError(status_pb2.Status(code=code_pb2.CANCELLED, message=text))
            case _:
                return None  # a kind that a newer server knows

    def finish(self) -> None:
        """Say that the stream has ended with OK.

        Raises:
            StreamError: it ended before the job did; BrokenImageError in the middle of an image.
        """
        self._images.finish()
        if not self._has_succeeded:
            raise StreamError("the stream ended before the job did")

    def _check_images(self, job: job_pb2.Job) -> None:
        self._images.finish(job.images)
        num_finished = self._images.num_finished
        if num_finished != len(job.images):
            raise StreamError(f"{num_finished} images have arrived of a job that drew {len(job.images)}")

    def _succeeded(self, job: job_pb2.Job, common: dict[str, Any]) -> Succeeded:
        if self._has_images:
            self._check_images(job)
        self._has_succeeded = True
        return Succeeded(
            job=job,
            timings=Timings(
                queue_seconds=_seconds(job.timings.queue),
                encode_seconds=_seconds(job.timings.encode),
                denoise_seconds=_seconds(job.timings.denoise),
                decode_seconds=_seconds(job.timings.decode),
                total_seconds=_seconds(job.timings.total),
            ),
            **common,
        )


def _seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()


def _optional_seconds(message: Message, field: str) -> float | None:
    return _seconds(getattr(message, field)) if message.HasField(field) else None
