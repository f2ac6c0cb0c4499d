"""What happens to a job, for any number of readers at any pace.

A feed keeps the newest event of each kind, not a history. A reader is a number: the sequence of the
last event that it took. So a reader that stops reading costs the feed nothing, and one that comes
back gets the newest state and all that follows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.job import CancelReason, Execution, Job, Progress, StoredImage
from hidream_grpc.model.parameters import GenerationParameters

MIN_NEWS_SECONDS = 1.0
MIN_NEWS_SHARE = 0.25
"""An estimate that changes by less than both is not told again."""


@dataclass(frozen=True, slots=True)
class Queued:
    """The job waits; 1 is next. The wait is None where it cannot be told."""

    queue_position: int
    estimated_wait_seconds: float | None = None

    def is_news(self, told: Queued, elapsed_seconds: float) -> bool:
        """Whether who was told something some time ago would want to know."""
        wait_seconds, told_seconds = self.estimated_wait_seconds, told.estimated_wait_seconds
        if self.queue_position != told.queue_position or wait_seconds is None or told_seconds is None:
            return self != told
        expected_seconds = max(0.0, told_seconds - elapsed_seconds)
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
    """All images are there."""

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


@dataclass(frozen=True, slots=True)
class _StoredImageEvent:
    """An image takes one sequence number for each of its parts, from first_sequence on."""

    first_sequence: int
    time: float
    image: StoredImage
    chunk_bytes: int

    @property
    def last_sequence(self) -> int:
        return self.first_sequence + max(0, self.image.size_bytes - 1) // self.chunk_bytes

    def part_after(self, sequence: int) -> JobEvent | None:
        part_sequence = max(self.first_sequence, sequence + 1)
        if part_sequence > self.last_sequence:
            return None
        offset = (part_sequence - self.first_sequence) * self.chunk_bytes
        length = min(self.chunk_bytes, self.image.size_bytes - offset)
        return JobEvent(part_sequence, self.time, ImagePart(self.image, offset, length))


def _is_news(body: Queued, newest: JobEvent) -> bool:
    return isinstance(newest.body, Queued) and body.is_news(newest.body, time.time() - newest.time)


class JobFeed:
    """The events of one job. Belongs to the event loop's thread."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._newest: dict[type[Body], JobEvent] = {}
        self._images: list[_StoredImageEvent] = []
        self._last_sequence = 0
        self._has_ended = False
        self._changed = asyncio.Event()

    def publish(self, body: Body) -> None:
        """Make an event known; an older one of its kind is forgotten."""
        if isinstance(body, Restarted):
            self._newest.pop(Progressed, None)
            self._newest.pop(Previewed, None)
        self._last_sequence += 1
        event = JobEvent(self._last_sequence, time.time(), body)
        self._newest[type(body)] = event
        self._has_ended = event.is_last
        self._wake_readers()

    def publish_if_new(self, body: Queued) -> None:
        """Make a place in the queue known, unless the newest event says much the same."""
        newest = self._newest.get(Queued)
        if newest is None or _is_news(body, newest):
            self.publish(body)

    def publish_image(self, image: StoredImage) -> None:
        """Make a stored image known, as parts of at most chunk_bytes."""
        stored = _StoredImageEvent(self._last_sequence + 1, time.time(), image, self._chunk_bytes)
        self._images.append(stored)
        self._last_sequence = stored.last_sequence
        self._wake_readers()

    def next_after(self, sequence: int) -> JobEvent | None:
        """The earliest event kept whose sequence is greater, or None when there is none yet."""
        candidates = [event for event in self._newest.values() if event.sequence > sequence]
        for image in self._images:
            if part := image.part_after(sequence):
                candidates.append(part)
                break
        return min(candidates, key=lambda event: event.sequence, default=None)

    async def follow(self, after_sequence: int = 0) -> AsyncGenerator[JobEvent]:
        """Yield the events after a sequence as they come, up to the job's last one."""
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
            else:
                await changed.wait()

    def _wake_readers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
