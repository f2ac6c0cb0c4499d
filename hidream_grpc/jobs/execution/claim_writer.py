"""What one claim of a job writes: the row, images and snapshots, each retried until it is stored.

The artifact is written first, then the row committed, then the event published.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from hidream_grpc.background import RETRY_SECONDS, Outage
from hidream_grpc.engine.requests import ImageFinished
from hidream_grpc.errors import (
    ArtifactUnavailableError,
    ClaimLostError,
    DeadlineExceededError,
    HiDreamError,
    JobCancelledError,
    SnapshotError,
    StorageFullError,
)
from hidream_grpc.jobs.execution.claim_state import ClaimState, Storing
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.job import CancelReason, Job, JobState, StoredSnapshot
from hidream_grpc.jobs.retrying import TRANSIENT_ERRORS, wait_at_most
from hidream_grpc.jobs.store.claims import Saved
from hidream_grpc.jobs.watching.events import JobFeed
from hidream_grpc.model.snapshot_format import SnapshotIdentity, unpack

logger = logging.getLogger(__name__)

GIVE_BACK_SECONDS = 1.5
"""How long the store is tried for a job that is given back; then other replicas take it as lost."""

Result = TypeVar("Result")


class StopChangedError(Exception):
    """What was to be written is out of date: the claim is stopped, or for a stronger reason."""


class ClaimWriter:
    """Holds a claimed job as it is now, and writes each change of it while the claim allows it.

    Attributes:
        job: the job as it is now; a caller sets it for a change that is written with the next one.
        state: the state of the claim.

    Args:
        on_change: called when the state of the claim has changed.
    """

    def __init__(self, job: Job, feed: JobFeed, tools: JobTools, on_change: Callable[[], None]) -> None:
        self.job = job
        self.state = ClaimState()
        self._feed = feed
        self._tools = tools
        self._on_change = on_change
        self._state_changed = asyncio.Event()
        # Only one task writes the row at a time, and always the newest job.
        self._writing = asyncio.Lock()

    def change(self, state: ClaimState) -> None:
        """Take over a state of the claim; a write that waits for the stores begins anew with it."""
        if state != self.state:
            self.state = state
            self._state_changed.set()
            self._on_change()

    async def save(self, job: Job) -> None:
        """Commit the job as it is now, and publish what is new in it.

        Raises:
            StopChangedError: the claim was stopped meanwhile, or is lost.
        """

        async def write() -> Job:
            async with self._writing:
                written = replace(job, snapshot=self.job.snapshot)
                if await self._tools.store.save(written) is Saved.IS_TO_BE_CANCELLED:
                    newest = await self._tools.store.get(None, job.job_id)
                    self.change(self.state.cancelled(newest.cancel_reason or CancelReason.REQUESTED))
                    raise StopChangedError
                # A snapshot may have been stored meanwhile.
                self.job = replace(written, snapshot=self.job.snapshot)
                return written

        self._feed.sync(await self._unless_lost(write))

    async def end(self, state: JobState, error: HiDreamError | None = None) -> None:
        """Write the end of the job; raises as `save`."""
        ended = self.job.ended(state, self._tools.store.clock.now(), error)
        await self.save(replace(ended, last_sequence=self._feed.reserve_sequence()))

    async def end_cancelled(self) -> None:
        """Write the end of a job that was cancelled; raises as `save`."""
        job_id = self.job.job_id
        reason = self.state.cancel_reason or CancelReason.REQUESTED
        self.job = replace(self.job, cancel_reason=reason)
        is_late = reason is CancelReason.DEADLINE
        await self.end(
            JobState.CANCELLED, DeadlineExceededError(job_id) if is_late else JobCancelledError(job_id)
        )

    async def release(self) -> None:
        """Give the job back, for any replica.

        Raises:
            StopChangedError: as `save`.
            StoreUnavailableError, StoreFullError: the store did not take it in time.
        """
        self._feed.sync(await self._unless_lost(lambda: self._tools.store.release(self.job)))

    async def add_image(self, event: ImageFinished) -> None:
        """Store an image, then commit and publish it; the job fails where there is no room for it."""
        job = self.job
        parameters = job.submission.parameters
        try:
            image = await self._retry_until_stored(
                lambda: self._tools.artifacts.write(
                    job.job_id, job.claim_number, event.image_index, parameters, event.data
                )
            )
        except StorageFullError as error:
            await self.end(JobState.FAILED, error)
            return
        image = replace(
            image,
            first_sequence=self._feed.reserve_sequence(),
            time=self._tools.store.clock.now(),
            chunk_bytes=self._tools.chunk_bytes,
        )
        with_image = job.with_image(image, event.decode_seconds)
        await self.save(replace(with_image, last_sequence=image.last_sequence))

    async def read_snapshot(self) -> bytes | None:
        """Read the snapshot that the job goes on from; None where it starts from its seed.

        Raises:
            StopChangedError: the claim was stopped meanwhile.
        """
        kept = self.job.snapshot
        if kept is None:
            return None
        job_id, claim_number = self.job.job_id, kept.claim_number
        data = await self._retry_until_stored(
            lambda: self._tools.artifacts.read_snapshot(job_id, claim_number)
        )
        self.job = replace(self.job, snapshot=None)
        if data is None:
            return None
        identity = SnapshotIdentity(self.job.submission.parameters, self._tools.checkpoint_fingerprint)
        try:
            step = unpack(data, identity).step
        except SnapshotError as error:
            logger.warning("job starts from its seed: %s", error, extra={"job_id": job_id})
            return None
        # Later than the row's where a kill came between.
        self.job = replace(self.job, snapshot=StoredSnapshot(claim_number, step))
        return data

    async def name_snapshot(self, step: int) -> None:
        """Have the row name a snapshot that is stored; tried once, since the next one makes up for it."""
        self.job = replace(self.job, snapshot=StoredSnapshot(self.job.claim_number, step))
        async with self._writing:
            if not self.state.is_running or self.job.state.has_ended:
                return
            try:
                await self._tools.store.save(self.job, is_news=False)
            except ClaimLostError:
                self.change(self.state.lost())

    async def remove_snapshots(self) -> None:
        """Remove the snapshots of a job that has ended."""
        try:
            await self._tools.artifacts.remove_snapshots(self.job.job_id)
        except ArtifactUnavailableError as error:
            logger.info("a snapshot stays until files without a job are removed: %s", error)

    async def _unless_lost(self, action: Callable[[], Awaitable[Job]]) -> Job:
        try:
            return await self._retry_until_stored(action)
        except ClaimLostError:
            self.change(self.state.lost())
            raise StopChangedError from None

    async def _retry_until_stored(self, action: Callable[[], Awaitable[Result]]) -> Result:
        """Retry an action until the stores take it, for as long as the state of the claim asks for it.

        Raises:
            StopChangedError: the state of the claim has changed.
            HiDreamError: what the last try raised, where the claim does not wait for the stores.
        """
        state = self.state
        give_up_time = time.monotonic() + GIVE_BACK_SECONDS
        outage = Outage(logger, f"store the state of job {self.job.job_id}")
        while True:
            try:
                result = await action()
                outage.note_success()
                return result
            except TRANSIENT_ERRORS as error:
                outage.note_failure(error)
                if state.storing is Storing.FOR_A_WHILE and time.monotonic() > give_up_time:
                    raise
            self._state_changed.clear()
            if self.state == state:
                await wait_at_most(self._state_changed, RETRY_SECONDS)
            if self.state != state:
                raise StopChangedError
