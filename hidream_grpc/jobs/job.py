"""A job and the states that it goes through. Pure: every change gives a new value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum

import msgspec

from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import DeadlineExceededError, HiDreamError, JobCancelledError
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.weight_format import WeightFormats
from hidream_grpc.traces import TraceContext

CLAIM_SEQUENCE_BITS = 32


def claim_sequence(claim_number: int, counter: int) -> int:
    """The sequence of an event: it grows within a claim, and from claim to claim."""
    return claim_number << CLAIM_SEQUENCE_BITS | counter


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


class CancelReason(Enum):
    """Reasons why a job is stopped."""

    CALLER_LEFT = "CALLER_LEFT"
    REQUESTED = "REQUESTED"
    DEADLINE = "DEADLINE"


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that checked a request, and that generates its images.

    Attributes:
        fingerprint: identifies configuration and weights; with another one the images are others.
    """

    name: str
    variant: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that was checked: nothing in it is missing or out of range.

    Attributes:
        request_id: the caller's name of the request, or one that was made up.
        caller: who asked; callers take turns.
        model: None in what was kept before there were several: any model may generate its images.
        deadline_seconds: time left until the caller's deadline; None for none.
        request_digest: digest of what the caller sent, after the version of its rule and a colon; empty in
            what was kept before there was one.
        left_open: the parameters that the caller did not send, and `model` where it named none.
    """

    parameters: GenerationParameters
    request_id: str
    caller: str
    priority: Priority = Priority.NORMAL
    labels: Mapping[str, str] = field(default_factory=dict)
    is_detached: bool = False
    deadline_seconds: float | None = None
    model: ModelIdentity | None = None
    request_digest: str = ""
    left_open: tuple[str, ...] = ()


def asks_for_the_same(retry: Submission, earlier: Submission) -> bool:
    """Whether a request repeats that of an earlier job: its caller sent the same.

    Where the digests were made by two rules, as after an upgrade of the service, every field that the
    retry sends has to be that of the earlier job.
    """
    if retry.request_digest and _rule_of(retry) == _rule_of(earlier):
        return retry.request_digest == earlier.request_digest
    left_open = [name for name in retry.left_open if name != "model"]
    applied = {name: getattr(earlier.parameters, name) for name in left_open}
    models = {each.model.name for each in (retry, earlier) if each.model is not None}
    return (
        msgspec.structs.replace(retry.parameters, **applied).digest == earlier.parameters.digest
        and (len(models) <= 1 or "model" in retry.left_open)
        and (retry.priority, retry.is_detached) == (earlier.priority, earlier.is_detached)
        and retry.labels == earlier.labels
    )


def _rule_of(submission: Submission) -> str:
    return submission.request_digest.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Execution:
    """How the images are generated."""

    model: str
    scheduler: str
    shift: float
    layout: str
    attempt: int = 1
    weights: WeightFormats = field(default_factory=WeightFormats)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the denoising is; the time to the job's end is None where it cannot be estimated."""

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
    """A finished image in the artifact store.

    Attributes:
        first_sequence: sequence of the event of its first part.
        time: when that event happened, in seconds since the epoch.
        chunk_bytes: size of every part but the last, fixed when the image is published: its parts keep
            their sequences.
        claim_number: number of the claim that stored it, which is part of its key.
    """

    index: int
    width: int
    height: int
    seed: int
    mime_type: str
    size_bytes: int
    sha256: bytes
    first_sequence: int = 0
    time: float = 0.0
    chunk_bytes: int = 0
    claim_number: int = 0

    @property
    def last_sequence(self) -> int:
        """Sequence of the event of the image's last part."""
        return self.first_sequence + max(0, self.size_bytes - 1) // self.chunk_bytes


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """A snapshot in the artifact store, which a job can go on from.

    Attributes:
        claim_number: number of the claim that stored it, which is part of its key.
        step: the step that it was taken after; the stored one may be newer.
    """

    claim_number: int
    step: int


@dataclass(frozen=True, slots=True)
class Job:
    """One request for images as it is at one moment. Times are seconds since the epoch.

    Attributes:
        owner: the identity that submitted the job; no other may see it.
        claim_number: how often the job was claimed, to run or to end it; 0 while it waits for the first
            time. Sequences of events grow with it.
        started_sequence: sequence of the newest `started` event; 0 for none.
        last_sequence: sequence of the newest event that is kept; for a job that has ended, of its last event.
        deadline_time: when the job stops; None for never.
        cancel_reason: who or what stopped the job, or asks for it while the job still runs.
        snapshot: the newest snapshot that counts; None without one.
        is_unreadable: whether its row cannot be read: then it is FAILED, and its submission is a stand-in.
        trace: the job's own span, from its creation to its end; None where it is not traced.
    """

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
    owner: str = ""
    claim_number: int = 0
    started_sequence: int = 0
    last_sequence: int = 0
    deadline_time: float | None = None
    cancel_reason: CancelReason | None = None
    snapshot: StoredSnapshot | None = None
    is_unreadable: bool = False
    trace: TraceContext | None = None

    @property
    def model_fingerprint(self) -> str:
        """Fingerprint of the model that generates the job's images; empty where any model may."""
        return "" if self.submission.model is None else self.submission.model.fingerprint

    def started(self, execution: Execution, now: float) -> Job:
        """QUEUED → RUNNING; a job that was given back keeps the time of its first start."""
        self._expect(JobState.QUEUED)
        start_time = max(now, self.create_time) if self.start_time is None else self.start_time
        return replace(
            self,
            state=JobState.RUNNING,
            stage=JobStage.ENCODING,
            execution=execution,
            start_time=start_time,
            timings=replace(self.timings, queue_seconds=start_time - self.create_time),
        )

    def encoded(self, encode_seconds: float) -> Job:
        """The job once its prompts are encoded: denoising begins."""
        self._expect(JobState.RUNNING)
        timings = replace(self.timings, encode_seconds=self.timings.encode_seconds + encode_seconds)
        return replace(self, stage=_stage_after(self.progress), timings=timings)

    def progressed(self, progress: Progress, denoise_seconds: float) -> Job:
        """The job after a step."""
        self._expect(JobState.RUNNING)
        return replace(
            self,
            stage=_stage_after(progress),
            progress=progress,
            timings=replace(self.timings, denoise_seconds=denoise_seconds),
        )

    def restarted(self, attempt: int, resumed_from_step: int) -> Job:
        """The job after the rank group was lost: it goes on after a step, with the progress of that step."""
        self._expect(JobState.RUNNING)
        assert self.execution is not None
        progress = None
        if self.progress is not None and resumed_from_step > 0:
            progress = replace(self.progress, step=resumed_from_step, estimated_remaining_seconds=None)
        return replace(
            self,
            stage=JobStage.ENCODING,
            execution=replace(self.execution, attempt=attempt),
            progress=progress,
        )

    def with_image(self, image: StoredImage, decode_seconds: float) -> Job:
        """The job with an image that is finished and stored."""
        self._expect(JobState.RUNNING)
        timings = replace(self.timings, decode_seconds=self.timings.decode_seconds + decode_seconds)
        images = tuple(sorted((*self.images, image), key=lambda i: i.index))
        return replace(self, images=images, timings=timings)

    def requeued(self) -> Job:
        """QUEUED or RUNNING → QUEUED: the claim is given back; images and snapshot stay."""
        self._expect(JobState.QUEUED, JobState.RUNNING)
        return replace(self, state=JobState.QUEUED, stage=None, progress=None)

    def cancelled_unclaimed(self, reason: CancelReason, now: float) -> Job:
        """QUEUED or RUNNING → CANCELLED while no replica has the job; counts as a claim of its own."""
        is_late = reason is CancelReason.DEADLINE
        error = DeadlineExceededError(self.job_id) if is_late else JobCancelledError(self.job_id)
        claim_number = self.claim_number + 1
        return replace(
            self.ended(JobState.CANCELLED, now, error),
            cancel_reason=reason,
            claim_number=claim_number,
            last_sequence=claim_sequence(claim_number, 1),
        )

    def ended(self, state: JobState, now: float, error: HiDreamError | None = None) -> Job:
        """QUEUED or RUNNING → one of the states that a job never leaves."""
        self._expect(JobState.QUEUED, JobState.RUNNING)
        # Clocks of replicas follow that of the database by less than a second.
        end_time = max(now, self.start_time or self.create_time)
        timings = replace(self.timings, total_seconds=end_time - self.create_time)
        if self.start_time is None:
            timings = replace(timings, queue_seconds=timings.total_seconds)
        return replace(self, state=state, stage=None, error=error, end_time=end_time, timings=timings)

    def _expect(self, *states: JobState) -> None:
        if self.state not in states:
            raise ValueError(f"job {self.job_id} is {self.state}, not {' or '.join(states)}")


def _stage_after(progress: Progress | None) -> JobStage:
    """The stage that follows once the prompts are encoded."""
    is_denoised = progress is not None and progress.step == progress.total_steps
    return JobStage.DECODING if is_denoised else JobStage.DENOISING
