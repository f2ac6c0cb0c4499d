"""What callers were told, by whom and when: the record that the promises are checked against."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

ENDS = {"succeeded": "SUCCEEDED", "failed": "FAILED", "cancelled": "CANCELLED"}
"""The events that end a job, and the state that each tells."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What makes an image: equal requests give equal images."""

    prompt: str
    side: int
    num_inference_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A job that a replica accepted, or said to have accepted before.

    Attributes:
        has_deadline: whether its caller gave one, so that it may end as CANCELLED.
        is_alone: whether nothing else is drawn, and nothing fails, until it has ended.
    """

    job_id: str
    request_id: str
    image_request: ImageRequest
    replica: str
    has_deadline: bool = False
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A CancelJob that was answered, with the state that it told; or a caller of Generate that left."""

    job_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Told:
    """One event of one job in one stream.

    Attributes:
        reader: who reads, over all of its streams from one sequence to the next.
        seconds: monotonic, of its arrival.
    """

    reader: str
    replica: str
    job_id: str
    sequence: int
    kind: str
    seconds: float


@dataclass(frozen=True, slots=True)
class ChangeTold:
    """One message of a WatchJobs stream."""

    reader: str
    replica: str
    job_id: str
    state: str
    seconds: float


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A stream that had not ended when it had to.

    Attributes:
        silent_seconds: since its last news, or since all was well and its job had ended, if that is later.
    """

    reader: str
    replica: str
    job_id: str
    silent_seconds: float


@dataclass(frozen=True, slots=True)
class FinalImage:
    """One image of a job that succeeded, as a replica tells of it, and as it was downloaded.

    Attributes:
        problem: how the download ended, where that was not well.
    """

    index: int
    told_bytes: int
    told_sha256: str
    num_bytes: int
    sha256: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """An image that a caller read while things failed."""

    job_id: str
    replica: str
    image: FinalImage


@dataclass(frozen=True, slots=True)
class FinalJob:
    """A job as one replica tells of it when all is over.

    Attributes:
        state: empty when the replica does not know the job.
        times: create, start and end, in nanoseconds; 0 for one that is absent.
        shortest_timing_seconds: the least of its timings.
    """

    job_id: str
    replica: str
    state: str
    times: tuple[int, int, int] = (0, 0, 0)
    shortest_timing_seconds: float = 0.0
    images: tuple[FinalImage, ...] = ()
    error: str = ""


@dataclass
class History:
    """Everything that was recorded; any thread may add.

    Attributes:
        downloads: images that were read while things failed, as far as the call ended with OK.
        refusals: calls that were answered with an error, by the name of the call and of the code.
        num_listed_images: of each job that is listed in the end, also where its acknowledgement was lost.
    """

    acknowledged: list[Acknowledged] = field(default_factory=list)
    cancelled: list[Cancelled] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    changes: list[ChangeTold] = field(default_factory=list)
    downloads: list[Downloaded] = field(default_factory=list)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    open_streams: list[OpenStream] = field(default_factory=list)
    final_jobs: list[FinalJob] = field(default_factory=list)
    stored_files: list[str] = field(default_factory=list)
    num_listed_images: dict[str, int] = field(default_factory=dict)
    num_reconnects: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, what: Acknowledged | Cancelled | Told | ChangeTold | Downloaded) -> None:
        """Add one thing that a caller was told."""
        with self._lock:
            match what:
                case Acknowledged():
                    self.acknowledged.append(what)
                case Cancelled():
                    self.cancelled.append(what)
                case Told():
                    self.told.append(what)
                case ChangeTold():
                    self.changes.append(what)
                case Downloaded():
                    self.downloads.append(what)

    def note_refusal(self, call: str, code: str) -> None:
        """Add a call that was answered with an error."""
        with self._lock:
            self.refusals.append((call, code))

    def note_reconnect(self) -> None:
        """Count a reader that goes on where its stream broke off."""
        with self._lock:
            self.num_reconnects += 1
