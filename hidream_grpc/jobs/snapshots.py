"""Snapshots of one job that is drawn here, on their way to the artifact store."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from hidream_grpc.engine.requests import SnapshotTaken
from hidream_grpc.errors import (
    ArtifactUnavailableError,
    StorageFullError,
    StoreFullError,
    StoreUnavailableError,
)
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.outages import Outage
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.model.snapshot_format import SnapshotError, unpack

logger = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 1.0
"""Between two that are kept, however many are taken."""


class SnapshotKeeper:
    """Keeps the newest snapshot; one that cannot be kept is made up for by the next."""

    def __init__(self, job_id: str, store: SqlJobStore, artifacts: ArtifactStore) -> None:
        self._store = store
        self._artifacts = artifacts
        self._newest: SnapshotTaken | None = None
        self._kept_time = 0.0
        self._outage = Outage(logger, f"keep snapshots of job {job_id}")

    def take(self, snapshot: SnapshotTaken) -> None:
        """Remember it in place of the one before: each is megabytes."""
        self._newest = snapshot

    @property
    def is_due(self) -> bool:
        """Whether the last one was kept long enough ago."""
        return time.monotonic() - self._kept_time >= SNAPSHOT_SECONDS

    async def keep(self, job: Job) -> Job:
        """Write the newest, if there is one that is not written; returns the job with its step.

        Raises:
            ClaimLostError: somebody else has the job.
        """
        snapshot, self._newest = self._newest, None
        if snapshot is None:
            return job
        self._kept_time = time.monotonic()
        kept = replace(job, snapshot_step=snapshot.step)
        try:
            await self._artifacts.write_snapshot(job.job_id, snapshot.data)
            await self._store.save(kept)
        except (StoreUnavailableError, StoreFullError, ArtifactUnavailableError, StorageFullError) as error:
            self._outage.note_failure(error)
            return job
        self._outage.note_success()
        return kept

    async def remove(self, job: Job) -> None:
        """Remove what is kept of a job that has ended."""
        if job.snapshot_step is None:
            return
        try:
            await self._artifacts.remove_snapshot(job.job_id)
        except ArtifactUnavailableError as error:
            logger.warning("a snapshot stays until its job is removed: %s", error)


def step_of(snapshot: bytes | None) -> int | None:
    """The step it was taken after: later than the row's where a kill came between. None: it is unreadable."""
    try:
        return None if snapshot is None else unpack(snapshot).step
    except SnapshotError:
        return None
