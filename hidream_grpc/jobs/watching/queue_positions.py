"""The position and the estimated wait of each job that waits, as of the changes of the store.

The queue is read when the server starts and after an outage; from then on only the jobs that change are read.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import JobWork
from hidream_grpc.jobs.execution.executor import ClaimLimits
from hidream_grpc.jobs.store.changes import ROW_KINDS, ChangeKind, Subscription
from hidream_grpc.jobs.store.order import CallerLoads, WaitingJob, claim_order, num_before_newest
from hidream_grpc.jobs.store.records import QueuedJob
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import FIRST_POSITION, JobFeed, Queued
from hidream_grpc.jobs.watching.feeds import JobFeeds

PAUSE_SECONDS = 0.1
"""Seconds between two reads of what has changed, however much changes."""
REFRESH_SECONDS = 1.0
"""Seconds until readers are told what the estimates have become meanwhile."""
DURATIONS_SECONDS = 5.0
"""Seconds until the durations of the queue are estimated again where no job of it is followed."""
SMALL_QUEUE = 256
"""Jobs of a queue that is gone through at each change: that takes less than a millisecond."""
MAX_SHARE = 1 / 50
"""Share of the time that ordering a larger queue may take."""
PAGE_SIZE = 200
JOBS_PER_TURN = 100
"""Number of feeds that are published to before other calls have their turn."""


@dataclass(frozen=True, slots=True)
class QueueDurations:
    """How long the jobs wait that wait for one model.

    Attributes:
        seconds: until the last of them starts, as this server estimates; 0 where that is unknown.
        oldest_seconds: for which the oldest of them has waited.
    """

    seconds: float = 0.0
    oldest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A job that waits.

    Attributes:
        model_fingerprint: of the model that it waits for.
        work: None where its row cannot be read.
    """

    order: WaitingJob
    model_fingerprint: str
    create_time: float
    work: JobWork | None


class QueuePositions:
    """Knows the position of every waiting job, and publishes it to the readers of the job.

    The positions of a large queue are a moment old, while jobs leave it: its order is made again in a fixed
    share of the time. A job that comes has its own position at once. Belongs to the event loop's thread.

    Attributes:
        durations: of the queue of this server's model, as last estimated.
    """

    def __init__(
        self, store: SqlJobStore, feeds: JobFeeds, estimator: JobEstimator, limits: ClaimLimits
    ) -> None:
        self.durations = QueueDurations()
        self._durations_time = -math.inf
        self._store = store
        self._limits = limits
        self._feeds = feeds
        self._estimator = estimator
        # None while nothing is followed: then the queue is read whenever it is asked for.
        self._changes: Subscription | None = None
        self._is_complete = False
        # By job id.
        self._waiting: dict[str, _Waiting] = {}
        self._newest_number = 0
        # As last made, with the jobs that came since; by model.
        self._orders: dict[str, list[WaitingJob]] = {}
        self._due: set[str] = set()
        # Those in the orders whose rows cannot be read.
        self._unreadable: set[str] = set()
        self._loads = CallerLoads()
        self._positions: dict[str, int] = {}
        self._is_outdated = False
        self._order_end = 0.0
        self._order_seconds = 0.0
        self._asked_for: set[str] = set()
        self._reading = asyncio.Lock()

    async def of(self, job_ids: Collection[str]) -> list[Queued | None]:
        """Position and estimated wait of each of the jobs; None for one that does not wait.

        Raises:
            StoreUnavailableError: the queue cannot be read.
        """
        if unknown := [job_id for job_id in job_ids if job_id not in self._waiting]:
            self._asked_for.update(unknown)
            async with self._reading:
                # They may have been read meanwhile.
                if any(job_id in self._asked_for and job_id not in self._waiting for job_id in unknown):
                    await self._read()
        has_position = all(job_id in self._positions for job_id in job_ids if job_id in self._waiting)
        if not has_position or (self._is_outdated and self._may_order and len(unknown) < len(job_ids)):
            async with self._reading:
                await self._order()
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
        with self._store.subscribe(ROW_KINDS) as changes:
            self._changes, self._is_complete = changes, False
            try:
                await keep_doing("read the queue", self._refresh, self._pause)
            finally:
                self._changes = None

    async def _pause(self) -> None:
        assert self._changes is not None
        await asyncio.sleep(PAUSE_SECONDS)
        # Calls take changes, too: a wait for changes alone might not end.
        for _ in range(round(DURATIONS_SECONDS / REFRESH_SECONDS)):
            try:
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._changes.wait()
                return
            except TimeoutError:
                if any(job_id in self._waiting for job_id in self._feeds.job_ids):
                    return

    async def _refresh(self) -> None:
        async with self._reading:
            if self._changes is None or self._changes.has_pending or not self._is_complete:
                await self._read()
            if self._is_outdated and self._may_order:
                await self._order()
        await self._publish()
        # It goes through the whole queue.
        if self._is_small or time.monotonic() - self._durations_time >= REFRESH_SECONDS:
            self._estimate_durations()

    async def _publish(self) -> None:
        for number, job_id in enumerate(self._feeds.job_ids):
            if number % JOBS_PER_TURN == JOBS_PER_TURN - 1:
                await asyncio.sleep(0)
            feed, position = self._feeds.get(job_id), self._position(job_id)
            if feed is not None and position is not None:
                feed.publish_position(position)

    def _estimate_durations(self) -> None:
        own = (w for w in self._waiting.values() if w.model_fingerprint == self._limits.model_fingerprint)
        now = self._store.clock.now()
        oldest_seconds = max(0.0, now - min((waiting.create_time for waiting in own), default=now))
        self.durations = QueueDurations(self._estimator.last_start_seconds or 0.0, oldest_seconds)
        self._durations_time = time.monotonic()

    # --- what waits -------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Read the jobs that have changed or are asked for, or all that wait where changes were missed."""
        asked_for, self._asked_for = self._asked_for - self._waiting.keys(), set()
        changes = () if self._changes is None else self._changes.take_pending()
        is_complete = self._is_complete and all(change.kind is not ChangeKind.ANYTHING for change in changes)
        # Unless all of this is read.
        self._is_complete = False
        if is_complete:
            job_ids = asked_for.union(change.job_id for change in changes)
            found = {queued.waiting.job_id: queued for queued in await self._store.waiting_among(job_ids)}
            for job_id in job_ids - found.keys():
                self._remove(job_id)
            for queued in found.values():
                self._add(queued)
        else:
            await self._read_all()
        self._is_complete = self._changes is not None
        if self._is_outdated and self._is_small:
            await self._order()

    async def _read_all(self) -> None:
        waiting: dict[str, _Waiting] = {}
        number = 0
        while page := await self._store.waiting_after(number, PAGE_SIZE):
            waiting.update((queued.waiting.job_id, self._waiting_of(queued)) for queued in page)
            number = page[-1].waiting.acceptance_number
        self._waiting, self._newest_number = waiting, number
        await self._order()

    def _waiting_of(self, queued: QueuedJob) -> _Waiting:
        job = queued.job
        model_fingerprint = job.model_fingerprint or self._limits.model_fingerprint
        work = None if job.is_unreadable else JobWork.of(job)
        return _Waiting(queued.waiting, model_fingerprint, job.create_time, work)

    def _remove(self, job_id: str) -> None:
        if self._waiting.pop(job_id, None) is not None:
            self._positions.pop(job_id, None)
            self._is_outdated = True

    def _add(self, queued: QueuedJob) -> None:
        """Take a job in; where it is the newest it has its position at once."""
        job_id = queued.waiting.job_id
        if job_id in self._waiting:
            return
        waiting = self._waiting[job_id] = self._waiting_of(queued)
        order = self._orders.setdefault(waiting.model_fingerprint, [])
        number = waiting.order.acceptance_number
        is_newest = number > self._newest_number
        self._newest_number = max(self._newest_number, number)
        if not is_newest or self._limits.max_running_jobs_of_caller is not None:
            self._is_outdated = True
            return
        num_before = num_before_newest(order, waiting.order, self._loads.last_turns, self._due)
        # Jobs that are behind it now have other positions, and which turn is the oldest's may change.
        self._is_outdated |= num_before < len(order) or bool(self._due)
        order.insert(num_before, waiting.order)
        self._positions[job_id] = num_before + FIRST_POSITION
        if waiting.work is None:
            self._unreadable.add(job_id)
        elif waiting.model_fingerprint == self._limits.model_fingerprint:
            # The estimator does not know the others.
            before = order[:num_before] if self._unreadable else ()
            num_unreadable = sum(job.job_id in self._unreadable for job in before)
            self._estimator.note_newest(waiting.work, num_before - num_unreadable)

    # --- their order ------------------------------------------------------------------------------

    @property
    def _is_small(self) -> bool:
        return len(self._waiting) <= SMALL_QUEUE

    @property
    def _may_order(self) -> bool:
        return self._is_small or time.monotonic() - self._order_end >= self._order_seconds / MAX_SHARE

    async def _order(self) -> None:
        own_model = self._limits.model_fingerprint
        models = {own_model, *(waiting.model_fingerprint for waiting in self._waiting.values())}
        max_running_jobs = self._limits.max_running_jobs_of_caller
        loads = {model: await self._store.caller_loads(model, max_running_jobs) for model in models}
        self._loads = loads[own_model]
        start = time.monotonic()
        self._is_outdated = False
        by_model: dict[str, list[_Waiting]] = {self._limits.model_fingerprint: []}
        for waiting in self._waiting.values():
            by_model.setdefault(waiting.model_fingerprint, []).append(waiting)
        self._orders, self._positions, self._due = {}, {}, set()
        self._unreadable = {job_id for job_id, waiting in self._waiting.items() if waiting.work is None}
        for model_fingerprint, jobs in by_model.items():
            turns = claim_order(
                (waiting.order for waiting in jobs), loads.get(model_fingerprint, self._loads)
            )
            order = list(turns)
            self._due |= turns.due
            self._orders[model_fingerprint] = order
            job_ids = [job.job_id for job in order]
            self._positions.update(zip(job_ids, count(FIRST_POSITION), strict=False))
            if model_fingerprint == self._limits.model_fingerprint:
                works = (self._waiting[job_id].work for job_id in job_ids)
                self._estimator.note_waiting([work for work in works if work is not None])
        self._order_end = time.monotonic()
        self._order_seconds = self._order_end - start

    def _position(self, job_id: str) -> Queued | None:
        position = self._positions.get(job_id)
        if position is None:
            return None
        return Queued(
            position, self._estimator.wait_seconds(job_id), self._estimator.remaining_seconds(job_id)
        )
