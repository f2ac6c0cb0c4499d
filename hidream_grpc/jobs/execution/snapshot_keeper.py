"""Snapshots of one claim of a job, on their way to the artifact store while the job goes on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from hidream_grpc.background import Outage
from hidream_grpc.engine.requests import SnapshotTaken
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore

logger = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 1.0
"""Seconds between two snapshots that are stored, however many are taken."""


class SnapshotKeeper:
    """Stores the newest snapshot, at most once a second, and retries one that could not be stored.

    Args:
        on_stored: called with the step of each snapshot that is in the artifact store; may raise.
    """

    def __init__(
        self,
        job_id: str,
        claim_number: int,
        artifacts: ArtifactStore,
        on_stored: Callable[[int], Awaitable[None]],
    ) -> None:
        self._job_id = job_id
        self._claim_number = claim_number
        self._artifacts = artifacts
        self._on_stored = on_stored
        self._newest: SnapshotTaken | None = None
        self._has_newest = asyncio.Event()
        self._storing = asyncio.Lock()
        self._outage = Outage(logger, f"keep snapshots of job {job_id}")

    def take(self, snapshot: SnapshotTaken) -> None:
        """Remember a snapshot in place of the one before: each is megabytes."""
        self._newest = snapshot
        self._has_newest.set()

    async def run(self) -> None:
        """Store the newest snapshot, at most once a second, until cancelled."""
        while True:
            await self._has_newest.wait()
            begin = time.monotonic()
            await self.store()
            await asyncio.sleep(max(0.0, begin + SNAPSHOT_SECONDS - time.monotonic()))

    async def store(self) -> None:
        """Store the newest snapshot, unless it is stored; may be called beside `run`."""
        async with self._storing:
            snapshot, self._newest = self._newest, None
            self._has_newest.clear()
            if snapshot is None:
                return
            try:
                await self._artifacts.write_snapshot(self._job_id, self._claim_number, snapshot.data)
                await self._on_stored(snapshot.step)
            except Exception as error:
                # No error of a store may stop the job or its snapshots.
                self._outage.note_failure(error)
                self._newest = self._newest or snapshot
                self._has_newest.set()
                return
            self._outage.note_success()
