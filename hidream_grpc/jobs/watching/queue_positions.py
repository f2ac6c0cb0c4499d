"""The position and the estimated wait of each job that waits, read from the store when something changes."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.execution.executor import ClaimLimits
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.retrying import wait_at_most
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import FIRST_POSITION, JobFeed, Queued
from hidream_grpc.jobs.watching.feeds import JobFeeds

PAUSE_SECONDS = 0.1
"""Seconds between two reads of the queue, however much changes."""
REFRESH_SECONDS = 1.0
"""Seconds until the queue is read again without a change in it: the estimates change meanwhile."""


@dataclass(frozen=True, slots=True)
class QueueDurations:
    """How long the jobs wait that wait for one model.

    Attributes:
        seconds: until the last of them starts, as this server estimates; 0 where that is unknown.
        oldest_seconds: for which the oldest of them has waited.
    """

    seconds: float = 0.0
    oldest_seconds: float = 0.0


class QueuePositions:
    """Knows the position of every waiting job, and publishes it to the readers of the job.

    Attributes:
        durations: of the queue of this server's model, as last read.
    """

    def __init__(
        self, store: SqlJobStore, feeds: JobFeeds, estimator: JobEstimator, limits: ClaimLimits
    ) -> None:
        self.durations = QueueDurations()
        self._store = store
        self._limits = limits
        self._feeds = feeds
        self._estimator = estimator
        self._positions: Mapping[str, int] = {}
        self._waiting: Mapping[str, Job] = {}
        self._changed = asyncio.Event()
        self._reading = asyncio.Lock()
        self._num_reads = 0

    def notify(self) -> None:
        """Say that the queue has changed."""
        self._changed.set()

    async def of(self, job_ids: Collection[str]) -> list[Queued | None]:
        """Position and estimated wait of each of the jobs; None for one that does not wait.

        Raises:
            StoreUnavailableError: the queue cannot be read.
        """
        if not self._positions.keys() >= set(job_ids):
            await self._refresh()
        return [self._position(job_id) for job_id in job_ids]

    async def publish_to(self, job_id: str, feed: JobFeed) -> None:
        """Publish its position to the readers of a waiting job, whatever becomes of the job meanwhile."""
        try:
            (position,) = await self.of([job_id])
        except HiDreamError:
            # It is published when the queue can be read again.
            return
        if position is None:
            # It was claimed meanwhile.
            feed.publish_first_position()
        else:
            feed.publish_position(position)

    async def run(self) -> None:
        """Keep the positions up to date until cancelled."""
        await keep_doing("read the queue", self._refresh_changed, self._pause)

    async def _refresh_changed(self) -> None:
        self._changed.clear()
        await self._refresh()

    async def _pause(self) -> None:
        await asyncio.sleep(PAUSE_SECONDS)
        if self._positions:
            await wait_at_most(self._changed, REFRESH_SECONDS)
        else:
            await self._changed.wait()

    async def _refresh(self) -> None:
        """Read the queue, once for all that ask while it is being read."""
        num_reads = self._num_reads
        async with self._reading:
            # The next read but one began after this was asked for.
            if self._num_reads < num_reads + 2:
                await self._read()
                self._num_reads += 1
        for job_id in self._feeds.job_ids:
            feed, position = self._feeds.get(job_id), self._position(job_id)
            if feed is not None and position is not None:
                feed.publish_position(position)

    async def _read(self) -> None:
        own_model = self._limits.model_fingerprint
        orders = await self._store.queue_orders(own_model, self._limits.max_running_jobs_of_caller)
        order = orders[own_model]
        missing = [job_id for job_id in order if job_id not in self._waiting]
        found = {job.job_id: job for job in await self._store.get_all(missing)} if missing else {}
        known = {**self._waiting, **found}
        self._waiting = {job_id: known[job_id] for job_id in order if job_id in known}
        # Each model has a queue of its own.
        self._positions = {
            job_id: position
            for of_model in orders.values()
            for position, job_id in enumerate(of_model, start=FIRST_POSITION)
        }
        self._estimator.note_waiting(tuple(self._waiting.values()))
        oldest_time = min((job.create_time for job in self._waiting.values()), default=None)
        self.durations = QueueDurations(
            seconds=self._estimator.last_start_seconds or 0.0,
            oldest_seconds=0.0 if oldest_time is None else max(0.0, self._store.clock.now() - oldest_time),
        )

    def _position(self, job_id: str) -> Queued | None:
        position = self._positions.get(job_id)
        if position is None:
            return None
        return Queued(
            position, self._estimator.wait_seconds(job_id), self._estimator.remaining_seconds(job_id)
        )
