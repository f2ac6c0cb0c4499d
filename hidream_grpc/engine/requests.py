"""The seam to the layer above: what the engine takes from it, and what it reports to it. Frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Protocol

from hidream_grpc.errors import JobError
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.parameters import GenerationParameters, SampleSize
from hidream_grpc.traces import TraceContext


class EngineState(StrEnum):
    """Whether the rank group can work."""

    STARTING = "starting"
    SERVING = "serving"
    RECOVERING = "recovering"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def takes_requests(self) -> bool:
        """Whether requests are taken: while ranks are replaced they are, and wait."""
        return self in (EngineState.SERVING, EngineState.RECOVERING)


class Priority(IntEnum):
    """Which requests go first; the larger one."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


@dataclass(frozen=True, slots=True)
class RequestStarted:
    """The request is in the plan that is sent to the ranks next."""


@dataclass(frozen=True, slots=True)
class PromptsEncoded:
    """The text encoders have read the request's prompts; the time is the slowest rank's.

    Attributes:
        rank_encode_seconds: the time of each rank.
    """

    encode_seconds: float
    rank_encode_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepFinished:
    """One denoising step of the request has ended on all ranks.

    Attributes:
        step: steps taken, from 1.
        step_seconds: duration of this step on the slowest rank.
        rank_step_seconds: its duration on each rank.
    """

    step: int
    step_seconds: float
    rank_step_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PreviewMade:
    """A small JPEG of image 0 after a step."""

    step: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """The request can go on after this step from these bytes, on any rank group of the same checkpoint."""

    step: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ImageFinished:
    """One image of the request, as the bytes of a file that a rank has decoded and encoded."""

    image_index: int
    data: bytes
    decode_seconds: float
    rank: int = 0


@dataclass(frozen=True, slots=True)
class RequestRestarted:
    """The ranks lost what they held of the request; it goes on from a step, 0 for its seed."""

    attempt: int
    reason: str
    resumed_from_step: int


@dataclass(frozen=True, slots=True)
class RequestFinished:
    """All images were reported. The last event."""


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The request cannot be finished. The last event."""

    error: JobError


EngineEvent = (
    RequestStarted
    | PromptsEncoded
    | StepFinished
    | PreviewMade
    | SnapshotTaken
    | ImageFinished
    | RequestRestarted
    | RequestFinished
    | RequestFailed
)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One denoising step of a batch.

    Attributes:
        step_seconds: duration on the slowest rank.
        width, height: size of all requests in it, in pixels.
        num_samples: rows of the batch.
        prompt_tokens: length to which all prompts in it are padded.
        snapshot_seconds: cost of the snapshot that was handed up after it; 0 without one.
        round_seconds: duration of the round that held it, from its planning to its report; None where
            prompts were encoded or images decoded beside it.
    """

    step_seconds: float
    width: int
    height: int
    num_samples: int
    prompt_tokens: int = TRAINED_PROMPT_TOKENS
    snapshot_seconds: float = 0.0
    round_seconds: float | None = None

    @property
    def size(self) -> SampleSize:
        """Size of each of its samples."""
        return SampleSize(self.width, self.height, self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class PromptReport:
    """The prompts of the requests that start with one plan.

    Attributes:
        num_cache_hits: prompts that were encoded already; the empty one, which always is, not counted.
        num_cache_misses: prompts for which the text encoders ran.
    """

    num_cache_hits: int
    num_cache_misses: int


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request that the engine may start.

    Attributes:
        claim_id: name of the request in plans and at the ranks; another claim of its job is another request.
        job_id: name of its job in logs and errors.
        request_id: the caller's name of it, for the logs.
        parameters: what to generate.
        on_event: called in the event loop with each event, in order; must not block or raise.
        snapshot: the state from which the request goes on (`SnapshotTaken.data`); None for its seed.
        finished_images: those that need not be decoded any more.
        caller: who asked for it; callers take turns in steps.
        priority: whose requests step first.
        deadline: when its caller stops waiting, in seconds of time.monotonic; None for never.
        trace: the span of its job, for the logs; None where it is not traced.
    """

    claim_id: str
    job_id: str
    request_id: str
    parameters: GenerationParameters
    on_event: Callable[[EngineEvent], None]
    snapshot: bytes | None = None
    finished_images: frozenset[int] = frozenset()
    caller: str = ""
    priority: Priority = Priority.NORMAL
    deadline: float | None = None
    trace: TraceContext | None = None


class Backlog(Protocol):
    """The requests that are to run, which the controller takes before its next round."""

    def take(self) -> EngineRequest | None:
        """Remove and return the request that is next, or None when none waits."""

    @property
    def waiting_sizes(self) -> Collection[SampleSize]:
        """Sizes in pixels of those that would be there to be taken if a step held more."""

    def set_engine_state(self, state: EngineState) -> None:
        """Note whether the rank group can work; called at every change."""
