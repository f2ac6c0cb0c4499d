"""A request that runs, as the controller knows it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hidream_grpc.engine.messages import Admission
from hidream_grpc.engine.requests import EngineRequest
from hidream_grpc.model.snapshot_format import SnapshotError, unpack

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
    def start(cls, request: EngineRequest) -> RunningRequest:
        """A request at its snapshot, where it comes with one that can be read, or at its seed."""
        if request.snapshot is None:
            return cls(request)
        try:
            snapshot = Snapshot(unpack(request.snapshot).step, request.snapshot)
        except SnapshotError as error:
            logger.warning(
                "job starts from its seed: %s",
                error,
                extra=cls(request).log_fields,
            )
            return cls(request)
        return cls(request, snapshot=snapshot)

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
