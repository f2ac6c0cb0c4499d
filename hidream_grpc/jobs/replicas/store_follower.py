"""Keeps the feeds of this server up to date: reads rows that other replicas changed, relays progress."""

from __future__ import annotations

import asyncio
import logging

from hidream_grpc.background import Outage, keep_doing
from hidream_grpc.errors import JobInternalError, JobNotFoundError
from hidream_grpc.jobs.execution.executor import JobExecutor
from hidream_grpc.jobs.replicas.messages import decode
from hidream_grpc.jobs.store.changes import Change, ChangeKind, Subscription
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobEvent
from hidream_grpc.jobs.watching.feeds import JobFeeds

logger = logging.getLogger(__name__)


class StoreFollower:
    """Follows the changes of the store for feeds and executor."""

    def __init__(
        self,
        store: SqlJobStore,
        feeds: JobFeeds,
        executor: JobExecutor,
    ) -> None:
        self._store = store
        self._feeds = feeds
        self._executor = executor
        self._outdated: set[str] = set()
        # Events of a job that arrive while its row is read: the row holds what came before them.
        self._held_back: dict[str, list[JobEvent]] = {}
        self._is_outdated = asyncio.Event()

    async def run(self) -> None:
        """Follow until cancelled."""
        with self._store.subscribe() as changes:
            self._everything_changed()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._refresh_forever())
                tasks.create_task(self._follow(changes))

    async def _follow(self, changes: Subscription) -> None:
        outage = Outage(logger, "follow the changes of the store")
        async for change in changes:
            try:
                self._receive(change)
                outage.note_success()
            except Exception as error:
                # No error may end this: the changes that follow must be received.
                outage.note_failure(error)
                self._everything_changed()

    def _receive(self, change: Change) -> None:
        job_id = change.job_id
        match change.kind:
            case ChangeKind.PUBLISHED:
                if (relayed := decode(change.payload)) and (event := relayed.event()):
                    self._relay(job_id, event)
            case ChangeKind.CANCEL_REQUESTED:
                # Its reason is in the row; it may be claimed here at this moment, without a feed.
                self._read_again(job_id)
            case ChangeKind.DELETED:
                if feed := self._feeds.get(job_id):
                    feed.close(JobNotFoundError(job_id))
            case ChangeKind.ANYTHING:
                self._everything_changed()
                self._executor.notify()
            case ChangeKind.ADDED | ChangeKind.CHANGED:
                self._executor.note_claim(job_id, change.claim_number)
                if self._executor.job(job_id) is None:
                    self.outdate(job_id)
                # A claim takes a lock and ranks the queue: not for each image of each job.
                if change.kind is ChangeKind.ADDED:
                    self._executor.notify(change.priority)
                else:
                    self._executor.notify_changed(job_id)

    def _everything_changed(self) -> None:
        for job_id in self._feeds.job_ids:
            self.outdate(job_id)

    def outdate(self, job_id: str) -> None:
        """Read the job's row again for its readers at this server: what is known of it may be old."""
        if self._feeds.get(job_id) is not None:
            self._read_again(job_id)

    def _read_again(self, job_id: str) -> None:
        self._outdated.add(job_id)
        self._held_back.setdefault(job_id, [])
        self._is_outdated.set()

    def _relay(self, job_id: str, event: JobEvent) -> None:
        if self._feeds.get(job_id) is None:
            return
        if (held_back := self._held_back.get(job_id)) is not None:
            held_back.append(event)
        else:
            self._put(job_id, event)

    def _put(self, job_id: str, event: JobEvent) -> None:
        if (feed := self._feeds.get(job_id)) and self._executor.job(job_id) is None:
            feed.put(event)

    async def _refresh_forever(self) -> None:
        await keep_doing("read jobs that are followed", self._refresh_outdated, self._is_outdated.wait)

    async def _refresh_outdated(self) -> None:
        self._is_outdated.clear()
        failures: list[Exception] = []
        for job_id in tuple(self._outdated):
            self._outdated.discard(job_id)
            try:
                await self._refresh(job_id)
            except Exception as error:
                # The other jobs are read nevertheless.
                self._outdated.add(job_id)
                failures.append(error)
            if job_id not in self._outdated:
                for event in self._held_back.pop(job_id):
                    self._put(job_id, event)
        if self._outdated:
            self._is_outdated.set()
        if failures:
            raise failures[0]

    async def _refresh(self, job_id: str) -> None:
        try:
            job = await self._store.get(None, job_id)
        except JobInternalError:
            # The replica that has the job writes the row again, or the next claim ends the job.
            return
        except JobNotFoundError as error:
            if feed := self._feeds.get(job_id):
                feed.close(error)
            return
        if self._executor.job(job_id) is None and (feed := self._feeds.get(job_id)):
            feed.sync(job)
        if job.cancel_reason is not None and not job.state.has_ended:
            self._executor.cancel(job_id, job.cancel_reason)
