"""A job and the states that it goes through. Pure: every change gives a new value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum, StrEnum

from hidream_grpc.errors import HiDreamError
from hidream_grpc.model.parameters import GenerationParameters


class JobState(StrEnum):
    """QUEUED → RUNNING → SUCCEEDED | FAILED | CANCELLED; a job never leaves the last three."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def has_ended(self) -> bool:
        """Whether a job never leaves this state."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class JobStage(StrEnum):
    """What a running job is doing."""

    ENCODING = "ENCODING"
    DENOISING = "DENOISING"
    DECODING = "DECODING"


class Priority(IntEnum):
    """Which jobs go first; the larger one."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class CancelReason(Enum):
    """Who or what stopped a job."""

    CALLER_LEFT = "CALLER_LEFT"
    REQUESTED = "REQUESTED"
    DEADLINE = "DEADLINE"


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that was checked: nothing in it is missing or out of range.

    Attributes:
        request_id: the caller's name of the request, or one that was made up.
        caller: who asked; callers take turns.
        deadline_seconds: time left until the caller's deadline; None for none.
    """

    parameters: GenerationParameters
    request_id: str
    caller: str
    priority: Priority = Priority.NORMAL
    labels: Mapping[str, str] = field(default_factory=dict)
    is_detached: bool = False
    deadline_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Execution:
    """How the images are drawn."""

    model: str
    scheduler: str
    shift: float
    layout: str
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the denoising is; the remaining time is None until two steps have ended."""

    step: int
    total_steps: int
    step_seconds: float
    estimated_remaining_seconds: float | None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each stage so far."""

    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A finished image in the artifact store."""

    index: int
    width: int
    height: int
    seed: int
    mime_type: str
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Job:
    """One request for images as it is at one moment. Times are seconds since the epoch."""

    job_id: str
    submission: Submission
    create_time: float
    state: JobState = JobState.QUEUED
    stage: JobStage | None = None
    execution: Execution | None = None
    progress: Progress | None = None
    timings: Timings = Timings()
    images: tuple[StoredImage, ...] = ()
    error: HiDreamError | None = None
    start_time: float | None = None
    end_time: float | None = None

    def started(self, execution: Execution, now: float) -> Job:
        """QUEUED → RUNNING."""
        self._expect(JobState.QUEUED)
        return replace(
            self,
            state=JobState.RUNNING,
            stage=JobStage.ENCODING,
            execution=execution,
            start_time=now,
            timings=replace(self.timings, queue_seconds=now - self.create_time),
        )

    def encoded(self, encode_seconds: float) -> Job:
        """The prompts were read; denoising begins."""
        self._expect(JobState.RUNNING)
        timings = replace(self.timings, encode_seconds=self.timings.encode_seconds + encode_seconds)
        return replace(self, stage=JobStage.DENOISING, timings=timings)

    def progressed(self, progress: Progress, denoise_seconds: float) -> Job:
        """A step ended."""
        self._expect(JobState.RUNNING)
        is_last = progress.step == progress.total_steps
        return replace(
            self,
            stage=JobStage.DECODING if is_last else JobStage.DENOISING,
            progress=progress,
            timings=replace(self.timings, denoise_seconds=denoise_seconds),
        )

    def restarted(self, attempt: int) -> Job:
        """The rank group was lost; the job begins another attempt."""
        self._expect(JobState.RUNNING)
        assert self.execution is not None
        execution = replace(self.execution, attempt=attempt)
        return replace(self, stage=JobStage.ENCODING, execution=execution, progress=None)

    def with_image(self, image: StoredImage, decode_seconds: float) -> Job:
        """An image is finished and stored."""
        self._expect(JobState.RUNNING)
        timings = replace(self.timings, decode_seconds=self.timings.decode_seconds + decode_seconds)
        images = tuple(sorted((*self.images, image), key=lambda i: i.index))
        return replace(self, images=images, timings=timings)

    def ended(self, state: JobState, now: float, error: HiDreamError | None = None) -> Job:
        """QUEUED or RUNNING → one of the states that a job never leaves."""
        self._expect(JobState.QUEUED, JobState.RUNNING)
        timings = replace(self.timings, total_seconds=now - self.create_time)
        if self.start_time is None:
            timings = replace(timings, queue_seconds=now - self.create_time)
        return replace(self, state=state, stage=None, error=error, end_time=now, timings=timings)

    def _expect(self, *states: JobState) -> None:
        if self.state not in states:
            raise ValueError(f"job {self.job_id} is {self.state}, not {' or '.join(states)}")
