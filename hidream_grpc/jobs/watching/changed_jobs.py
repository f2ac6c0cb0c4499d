"""Reads each job that has changed once, however many follow the changes, and hands it to all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import HiDreamError, JobInternalError
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store.changes import ROW_KINDS, Change, ChangeKind, Subscription
from hidream_grpc.jobs.store.store import SqlJobStore

MAX_CHANGES_PER_READ = 100
GATHER_SECONDS = 0.05
"""How long changes are gathered before they are read: whoever made one has its answer first."""
FOLLOWERS_PER_TURN = 8
"""Number of followers that are woken before the event loop has its turn: each sends a message then."""
CLOSE_SECONDS = 0.5
"""How long changes that are being read are waited for when the service goes away."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class JobChange:
    """A job as it is after a change, and when that was, in seconds since the epoch.

    All who follow get the same object: what is made of it can be made once.
    """

    job: Job
    time: float


class Follower(Protocol):
    """One who follows changes; no call waits."""

    def offer(self, change: JobChange, read_start: float) -> None:
        """Take a job that was read; the read began at this moment of time.monotonic."""

    def forget(self, job_id: str) -> None:
        """Note that a job was deleted."""

    def read_everything(self) -> None:
        """Note that changes were missed."""

    def end(self, error: HiDreamError) -> None:
        """End with an error, after what was offered."""


class ChangedJobs:
    """The changes of the store's jobs, for all who follow them. Belongs to the event loop's thread."""

    def __init__(self, store: SqlJobStore) -> None:
        self._store = store
        self._followers: set[Follower] = set()
        self._closing_error: HiDreamError | None = None
        self._is_reading = False
        self._changes: Subscription | None = None

    @contextmanager
    def followed_by(self, follower: Follower) -> Iterator[None]:
        """Hand every change from now on to a follower, until the block ends."""
        self._followers.add(follower)
        if self._closing_error is not None:
            follower.end(self._closing_error)
        try:
            yield
        finally:
            self._followers.discard(follower)

    def close(self, error: HiDreamError) -> None:
        """End all followers with an error, those to come included, once they have what was changed before."""
        self._closing_error = error
        is_behind = self._is_reading or (self._changes is not None and self._changes.has_pending)
        delay_seconds = CLOSE_SECONDS if is_behind else 0.0
        asyncio.get_running_loop().call_later(delay_seconds, self._end_all, error)

    async def run(self) -> None:
        """Read what changes until cancelled."""
        with self._store.subscribe(ROW_KINDS) as changes:
            self._changes = changes
            for follower in self._followers:
                follower.read_everything()
            await keep_doing("read changed jobs", lambda: self._hand_on(changes), lambda: _gather(changes))

    async def _hand_on(self, changes: Subscription) -> None:
        self._is_reading = True
        try:
            while some := changes.take_pending(MAX_CHANGES_PER_READ):
                await self._read(some)
            if self._closing_error is not None:
                self._end_all(self._closing_error)
        except Exception as error:
            # Who follows must not take what is missing for nothing new.
            self._end_all(error if isinstance(error, HiDreamError) else JobInternalError.new())
            raise
        finally:
            self._is_reading = False

    async def _read(self, some: Sequence[Change]) -> None:
        if not self._followers:
            return
        read_start = time.monotonic()
        job_ids = dict.fromkeys(
            change.job_id for change in some if change.kind in (ChangeKind.ADDED, ChangeKind.CHANGED)
        )
        jobs = {job.job_id: job for job in await self._store.get_readable(job_ids)} if job_ids else {}
        now = self._store.clock.now()
        # In the order in which they changed.
        read = [JobChange(job, job.end_time or now) for job in map(jobs.get, job_ids) if job is not None]
        deleted = [change.job_id for change in some if change.kind is ChangeKind.DELETED]
        is_incomplete = any(change.kind is ChangeKind.ANYTHING for change in some)
        followers = tuple(self._followers)
        for start in range(0, len(followers), FOLLOWERS_PER_TURN):
            for follower in followers[start : start + FOLLOWERS_PER_TURN]:
                for change in read:
                    follower.offer(change, read_start)
                for job_id in deleted:
                    follower.forget(job_id)
                if is_incomplete:
                    follower.read_everything()
            await asyncio.sleep(0)

    def _end_all(self, error: HiDreamError) -> None:
        for follower in self._followers:
            follower.end(error)


async def _gather(changes: Subscription) -> None:
    """Return a moment after the first change."""
    await changes.wait()
    await asyncio.sleep(GATHER_SECONDS)
