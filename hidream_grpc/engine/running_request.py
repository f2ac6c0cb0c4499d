"""All that the engine knows of one request that runs: forgetting it is one deletion."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from hidream_grpc.engine.protocol.messages import Admission
from hidream_grpc.engine.requests import EngineEvent, EngineRequest, Priority, RequestRestarted, SnapshotTaken
from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.parameters import SampleSize
from hidream_grpc.model.snapshot_format import SnapshotIdentity, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A request as it was after a step, in the format of `model.snapshot_format`."""

    step: int
    data: bytes


@dataclass(slots=True)
class RunningRequest:
    """A request, how far it has come, and what it would go on from.

    A new one comes before those of its priority that have just taken a step, and behind those that wait.

    Attributes:
        request: what was asked for.
        step: steps that it has taken.
        turns_waited: forwards of others since its latest step; infinite after a restart.
        caller_turns_waited: forwards since its line's latest step, of those that it has seen.
        turns_in_order: forwards since one that the longest waiting request led, of those that it has seen.
        undecoded: indices of the images that are not finished.
        decoding: image index to the rank that is decoding it.
        is_admitted: whether the ranks have started it since its latest restart.
        snapshot: the newest that is known outside the ranks; None for its seed.
        attempt: one more than its restarts.
        step_seconds: duration of its latest step; None before.
        has_handed_up: whether a rank has handed up a snapshot of it.
        unsaved_seconds: duration of its steps since the latest snapshot that was handed up.
        cleared_above: a suspect is cleared once its progress is more than this; None for no suspect.
        has_failed_alone: whether work went wrong in which no other request had a part.
        line: its priority and caller; requests of which these are the same share their turns.
        size: what it adds to a forward for each sample; only requests of one size share a forward.
        step_pixels: width × height × samples, which it adds to a forward.
    """

    request: EngineRequest
    step: int = 0
    turns_waited: float = 1
    caller_turns_waited: int = 1
    turns_in_order: int = 0
    undecoded: set[int] = field(init=False)
    decoding: dict[int, int] = field(default_factory=dict)
    is_admitted: bool = False
    snapshot: Snapshot | None = None
    attempt: int = 1
    step_seconds: float | None = None
    has_handed_up: bool = False
    unsaved_seconds: float = 0.0
    cleared_above: int | None = None
    has_failed_alone: bool = False
    line: tuple[Priority, str] = field(init=False)
    size: SampleSize = field(init=False)
    step_pixels: int = field(init=False)

    def __post_init__(self) -> None:
        parameters = self.request.parameters
        self.undecoded = set(range(parameters.num_images)) - self.request.finished_images
        self.line = self.request.priority, self.request.caller
        self.size = parameters.sample_size
        self.step_pixels = parameters.width * parameters.height * parameters.num_samples

    @classmethod
    def start(cls, request: EngineRequest, checkpoint_fingerprint: str) -> RunningRequest:
        """A request at its snapshot, where it comes with one of this checkpoint, or at its seed."""
        running = cls(request)
        if request.snapshot is not None:
            identity = SnapshotIdentity(request.parameters, checkpoint_fingerprint)
            try:
                running.snapshot = Snapshot(unpack(request.snapshot, identity).step, request.snapshot)
            except SnapshotError as error:
                running.refuse_snapshot(str(error))
        running.step = running.resume_step
        return running

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about it carries."""
        trace = self.request.trace
        ids = {"job_id": self.request.job_id, "request_id": self.request.request_id}
        return ids if trace is None else ids | trace.log_fields

    @property
    def resume_step(self) -> int:
        """The step that it would go on after; 0 for its seed."""
        return self.snapshot.step if self.snapshot else 0

    @property
    def is_denoised(self) -> bool:
        """Whether it has taken all its steps."""
        return self.step == self.request.parameters.num_inference_steps

    @property
    def is_finished(self) -> bool:
        """Whether all its images are decoded."""
        return not self.undecoded

    @property
    def progress(self) -> int:
        """A number that grows with every step and every image."""
        return self.step + self.request.parameters.num_images - len(self.undecoded)

    @property
    def is_suspect(self) -> bool:
        """Whether it runs alone, since it may have broken the group."""
        return self.cleared_above is not None

    def admission(self) -> Admission:
        """The message that has a rank start it."""
        return Admission(
            claim_id=self.request.claim_id,
            log_fields=self.log_fields,
            parameters=self.request.parameters,
            snapshot=self.snapshot.data if self.snapshot else b"",
        )

    def publish(self, event: EngineEvent) -> None:
        """Report an event to the layer above."""
        self.request.on_event(event)

    def take_step(self, step_seconds: float) -> None:
        """Record a step that all ranks have taken."""
        self.step += 1
        self.turns_waited = 0
        self.step_seconds = step_seconds
        self.unsaved_seconds += step_seconds
        self._clear()

    def finish_image(self, image_index: int) -> None:
        """Record an image that is decoded."""
        self.undecoded.discard(image_index)
        self.decoding.pop(image_index, None)
        self._clear()

    def hand_up(self, snapshot: Snapshot) -> None:
        """Keep a snapshot that came with a step, and report it."""
        self.snapshot = snapshot
        self.has_handed_up = True
        self.unsaved_seconds = 0.0
        self.publish(SnapshotTaken(snapshot.step, snapshot.data))

    def suspect(self, progress: int) -> None:
        """Suspect it of what went wrong at this progress, until it comes further."""
        self.cleared_above = max(progress, self.cleared_above or 0)

    def refuse_snapshot(self, reason: str) -> None:
        """Forget a snapshot that cannot be used; the log says why."""
        self.snapshot = None
        logger.warning("job starts from its seed: %s", reason, extra=self.log_fields)

    def restart(self, reason: str) -> int:
        """Go on from the snapshot, or the seed; decoded images stay, others are given up.

        Returns:
            How many steps have to be taken again.
        """
        num_lost_steps = self.step - self.resume_step
        self.attempt += 1
        self.step = self.resume_step
        self.turns_waited = math.inf
        self.decoding.clear()
        self.is_admitted = False
        self.publish(RequestRestarted(self.attempt, reason, self.resume_step))
        return num_lost_steps

    def _clear(self) -> None:
        if self.cleared_above is not None and self.progress > self.cleared_above:
            self.cleared_above = None
