"""The events of a job, for any number of readers at any pace.

A feed keeps the newest event of each kind, not a history. A reader is a number: the sequence of the
last event that it took. So a reader that stops reading costs the feed nothing, and a reader that comes
back gets the newest state and all that follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from hidream_grpc.errors import HiDreamError, JobCancelledError
from hidream_grpc.jobs.job import (
    CancelReason,
    Execution,
    Job,
    JobState,
    Progress,
    StoredImage,
    claim_sequence,
)
from hidream_grpc.model.parameters import GenerationParameters

FIRST_POSITION = 1
"""The position of the job that is claimed next."""
MIN_NEWS_SECONDS = 1.0
MIN_NEWS_SHARE = 0.25
"""An estimate that changes by less than both is not published again."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits: position 1 is next. Until it starts, or ends, is None where it cannot be estimated."""

    queue_position: int
    estimated_wait_seconds: float | None = None
    estimated_remaining_seconds: float | None = None

    def is_news(self, published: Queued, elapsed_seconds: float) -> bool:
        """Whether this differs enough from what was published some time ago to be published, too."""
        wait_seconds, earlier_seconds = self.estimated_wait_seconds, published.estimated_wait_seconds
        if self.queue_position != published.queue_position or wait_seconds is None or earlier_seconds is None:
            return self != published
        expected_seconds = max(0.0, earlier_seconds - elapsed_seconds)
        difference_seconds = abs(wait_seconds - expected_seconds)
        return difference_seconds > max(MIN_NEWS_SECONDS, MIN_NEWS_SHARE * expected_seconds)


@dataclass(frozen=True, slots=True)
class Started:
    """The job left the queue."""

    parameters: GenerationParameters
    execution: Execution
    queue_seconds: float


@dataclass(frozen=True, slots=True)
class Progressed:
    """A denoising step ended."""

    progress: Progress


@dataclass(frozen=True, slots=True)
class Previewed:
    """A small JPEG of image 0 after a step."""

    step: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Restarted:
    """The rank group was lost; progress goes on from a step."""

    attempt: int
    reason: str
    resumed_from_step: int


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Bytes `offset` to `offset + length` of a finished image can be read from the artifact store."""

    image: StoredImage
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Succeeded:
    """All images are stored."""

    job: Job


@dataclass(frozen=True, slots=True)
class Failed:
    """The job could not be finished."""

    error: HiDreamError


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The job was stopped."""

    reason: CancelReason
    error: HiDreamError


Body = Queued | Started | Progressed | Previewed | Restarted | ImagePart | Succeeded | Failed | Cancelled


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event; time is in seconds since the epoch."""

    sequence: int
    time: float
    body: Body

    @property
    def is_last(self) -> bool:
        """Whether the job has ended with this event."""
        return isinstance(self.body, Succeeded | Failed | Cancelled)


def _part_after(image: StoredImage, sequence: int) -> JobEvent | None:
    """The event of the first part of an image after a sequence: each part has one, from first_sequence on."""
    part_sequence = max(image.first_sequence, sequence + 1)
    if part_sequence > image.last_sequence:
        return None
    offset = (part_sequence - image.first_sequence) * image.chunk_bytes
    length = min(image.chunk_bytes, image.size_bytes - offset)
    return JobEvent(part_sequence, image.time, ImagePart(image, offset, length))


class JobFeed:
    """The events of one job. Belongs to the event loop's thread.

    What follows from the job's row (`sync`) has the same sequences in every process; all else is sent once.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Take a clock that gives seconds since the epoch."""
        self._clock = clock
        self._newest: dict[type[Body], JobEvent] = {}
        self._images: dict[int, StoredImage] = {}
        self._last_sequence = 0
        self._claim_number = 0
        self._is_waiting = True
        self._has_ended = False
        self._closing_error: HiDreamError | None = None
        self._changed = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether the end of the job is known here."""
        return self._has_ended

    def continue_after(self, sequence: int) -> None:
        """Give later events greater sequences than this one."""
        self._last_sequence = max(self._last_sequence, sequence)

    def reserve_sequence(self) -> int:
        """Take the sequence of an event, or an image's first part, that is published once durable."""
        self._is_waiting = False
        return self._next_sequence()

    def publish(self, body: Body) -> JobEvent:
        """Publish an event with the next sequence; an older one of its kind is forgotten."""
        is_position = isinstance(body, Queued)
        sequence = self._last_sequence + 1 if is_position else self._next_sequence()
        event = JobEvent(sequence, self._clock(), body)
        self.put(event)
        return event

    def put(self, event: JobEvent) -> None:
        """Publish an event that has its sequence; nothing happens when it is not new."""
        newest = self._newest.get(type(event.body))
        if newest is not None and newest.sequence >= event.sequence:
            return
        if isinstance(event.body, Restarted | Started):
            self._newest.pop(Progressed, None)
            self._newest.pop(Previewed, None)
        self._newest[type(event.body)] = event
        self._has_ended = self._has_ended or event.is_last
        self.continue_after(event.sequence)
        self._wake_readers()

    def publish_position(self, position: Queued) -> None:
        """Publish a position in the queue, unless the job has started or the newest says much the same."""
        newest = self._newest_position()
        if self._is_waiting and (newest is None or position.is_news(newest[0], self._clock() - newest[1])):
            self.publish(position)

    def publish_first_position(self) -> None:
        """Publish that the job is next, unless that is published: every job that is claimed was next."""
        newest = self._newest_position()
        if self._is_waiting and (newest is None or newest[0].queue_position != FIRST_POSITION):
            self.publish(Queued(FIRST_POSITION))

    def sync(self, job: Job) -> None:
        """Publish what is new in the job's row; nothing happens with an older row."""
        if self._has_ended or job.claim_number < self._claim_number:
            return
        self._claim_number = job.claim_number
        self._is_waiting = job.state is JobState.QUEUED
        if job.started_sequence and job.execution is not None:
            started = Started(job.submission.parameters, job.execution, job.timings.queue_seconds)
            self.put(JobEvent(job.started_sequence, job.start_time or job.create_time, started))
        for image in job.images:
            if image.index not in self._images:
                self._images[image.index] = image
                self.continue_after(image.last_sequence)
        if job.state.has_ended:
            self.put(JobEvent(job.last_sequence, job.end_time or job.create_time, _end_of(job)))
        self.continue_after(max(job.last_sequence, claim_sequence(job.claim_number, 0) - 1))
        self._wake_readers()

    def close(self, error: HiDreamError) -> None:
        """End all readers with an error, unless the job has ended."""
        if not self._has_ended:
            self._closing_error = error
            self._wake_readers()

    async def wait_for_end(self) -> None:
        """Return when the end of the job is known here, or the feed was closed."""
        while not self._has_ended and self._closing_error is None:
            await self._changed.wait()

    def next_after(self, sequence: int) -> JobEvent | None:
        """The earliest event kept whose sequence is greater, or None when there is none yet."""
        candidates = [event for event in self._newest.values() if event.sequence > sequence]
        parts = (_part_after(image, sequence) for image in self._images.values())
        candidates.extend(part for part in parts if part is not None)
        return min(candidates, key=lambda event: event.sequence, default=None)

    async def follow(self, after_sequence: int = 0) -> AsyncGenerator[JobEvent]:
        """Yield the events after a sequence as they come, up to the job's last one.

        Raises:
            HiDreamError: what the feed was closed with.
        """
        sequence = after_sequence
        while True:
            changed = self._changed
            if event := self.next_after(sequence):
                yield event
                sequence = event.sequence
                if event.is_last:
                    return
            elif self._has_ended:
                return
            elif self._closing_error is not None:
                raise self._closing_error
            else:
                await changed.wait()

    def _next_sequence(self) -> int:
        """The next sequence of anything but a position: the first of a claim is left to a position."""
        return max(self._last_sequence, claim_sequence(self._claim_number, 0)) + 1

    def _newest_position(self) -> tuple[Queued, float] | None:
        """The position that was published since the job began to wait, and when."""
        event, started = self._newest.get(Queued), self._newest.get(Started)
        if event is None or (started is not None and event.sequence < started.sequence):
            return None
        return (event.body, event.time) if isinstance(event.body, Queued) else None

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _end_of(job: Job) -> Succeeded | Failed | Cancelled:
    if job.state is JobState.SUCCEEDED:
        return Succeeded(job)
    error = job.error or JobCancelledError(job.job_id)
    if job.state is JobState.FAILED:
        return Failed(error)
    return Cancelled(job.cancel_reason or CancelReason.REQUESTED, error)
