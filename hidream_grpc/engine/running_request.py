"""A request that runs, as the controller knows it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hidream_grpc.engine.protocol.messages import Admission
from hidream_grpc.engine.requests import EngineRequest
from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.snapshot_format import SnapshotIdentity, unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A request as it was after a step, as `model.snapshot_format` has it."""

    step: int
    data: bytes


@dataclass(slots=True)
class RunningRequest:
    """A request, and what it goes on from.

    Attributes:
        request: as it came.
        attempt: one more than its restarts.
        step_seconds: of its latest step; None before.
        snapshot: the newest that is known outside the ranks; None for its seed.
    """

    request: EngineRequest
    attempt: int = 1
    step_seconds: float | None = None
    snapshot: Snapshot | None = None

    @classmethod
    def start(cls, request: EngineRequest, checkpoint_fingerprint: str) -> RunningRequest:
        """A request at its snapshot, where it comes with one of this checkpoint, or at its seed."""
        running = cls(request)
        if request.snapshot is not None:
            identity = SnapshotIdentity(request.parameters, checkpoint_fingerprint)
            try:
                running.snapshot = Snapshot(unpack(request.snapshot, identity).step, request.snapshot)
            except SnapshotError as error:
                running.start_over(str(error))
        return running

    def start_over(self, reason: str) -> None:
        """Forget a snapshot that is refused; the log says why."""
        self.snapshot = None
        logger.warning("job starts from its seed: %s", reason, extra=self.log_fields)

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about it carries."""
        return {"job_id": self.request.job_id, "request_id": self.request.request_id}

    @property
    def resume_step(self) -> int:
        """The step that it goes on after; 0 for its seed."""
        return self.snapshot.step if self.snapshot else 0

    def admission(self) -> Admission:
        """What has a rank start it."""
        return Admission(
            claim_id=self.request.claim_id,
            job_id=self.request.job_id,
            request_id=self.request.request_id,
            parameters=self.request.parameters,
            snapshot=self.snapshot.data if self.snapshot else b"",
        )
