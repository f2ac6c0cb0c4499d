"""Publishes the changes of the store to subscribers: within one process, or over PostgreSQL."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

import asyncpg
import msgspec

from hidream_grpc.background import Outage
from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.retrying import wait_at_most
from hidream_grpc.jobs.store.database import Database
from hidream_grpc.jobs.store.failures import translated

logger = logging.getLogger(__name__)

CHANNEL = "hidream_jobs"
MAX_PAYLOAD_BYTES = 5_500
"""PostgreSQL takes less than 8,000 bytes, and the payload travels as Base64 with a job id."""
MAX_PENDING_CHANGES = 10_000
RECONNECT_SECONDS = (0.05, 0.2, 1.0, 2.0)
CHECK_SECONDS = 10.0


class ChangeKind(StrEnum):
    """The kinds of changes."""

    ADDED = "ADDED"
    """A job waits for a replica: a new one, or one that was given back."""
    CHANGED = "CHANGED"
    """A job's row was written otherwise: claimed, started, an image, ended."""
    CANCEL_REQUESTED = "CANCEL_REQUESTED"
    """The replica that has the job is to stop it."""
    DELETED = "DELETED"
    PUBLISHED = "PUBLISHED"
    """No row was written: the payload is what `SqlJobStore.publish` was given."""
    ANYTHING = "ANYTHING"
    """Changes were missed: everything may have changed. The change names no job."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something happened to a job.

    Attributes:
        claim_number: the job's claim number after a change of its row.
        priority: of a job that is new, which only another version may know; None where it is not said.
    """

    kind: ChangeKind
    job_id: str = ""
    payload: bytes = b""
    claim_number: int = 0
    priority: int | None = None


_decoder = msgspec.json.Decoder(Change)


def job_added(job: Job) -> Change:
    """The change that a new job waits for a replica."""
    return Change(ChangeKind.ADDED, job.job_id, priority=job.submission.priority)


def row_changed(job: Job) -> Change:
    """The change that the row of a job was written."""
    return Change(ChangeKind.CHANGED, job.job_id, claim_number=job.claim_number)


def given_back(job_id: str, claim_number: int) -> Change:
    """The change that a job waits for a replica again."""
    return Change(ChangeKind.ADDED, job_id, claim_number=claim_number)


ALL_KINDS = frozenset(ChangeKind)
ROW_KINDS = frozenset((ChangeKind.ADDED, ChangeKind.CHANGED, ChangeKind.DELETED))
"""The changes after which a job's row is another one."""


class Subscription(AsyncIterator[Change]):
    """Changes from its creation on, in order, without end; one that is far behind gets ANYTHING instead.

    Attributes:
        kinds: of the changes that it receives; ANYTHING is always among them.
    """

    def __init__(self, kinds: Collection[ChangeKind] = ALL_KINDS) -> None:
        self.kinds = frozenset((*kinds, ChangeKind.ANYTHING))
        self._pending: deque[Change] = deque()
        self._has_pending = asyncio.Event()

    def put(self, change: Change) -> None:
        """Append a change."""
        if len(self._pending) >= MAX_PENDING_CHANGES:
            self._pending.clear()
            change = Change(ChangeKind.ANYTHING)
        self._pending.append(change)
        self._has_pending.set()

    @property
    def has_pending(self) -> bool:
        """Whether changes have come that were not taken."""
        return bool(self._pending)

    def take_pending(self, max_changes: int | None = None) -> tuple[Change, ...]:
        """Remove and return the first changes that have come, or all of them."""
        num_changes = len(self._pending) if max_changes is None else min(max_changes, len(self._pending))
        return tuple(self._pending.popleft() for _ in range(num_changes))

    async def wait(self) -> None:
        """Return when a change has come that was not taken."""
        while not self._pending:
            self._has_pending.clear()
            await self._has_pending.wait()

    async def __anext__(self) -> Change:
        await self.wait()
        return self._pending.popleft()


class ChangeHub:
    """Hands changes to subscriptions. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._subscriptions: dict[ChangeKind, set[Subscription]] = {kind: set() for kind in ChangeKind}

    @contextmanager
    def subscribe(self, kinds: Collection[ChangeKind] = ALL_KINDS) -> Iterator[Subscription]:
        """The changes of these kinds, and ANYTHING, from now on until the block ends."""
        subscription = Subscription(kinds)
        for kind in subscription.kinds:
            self._subscriptions[kind].add(subscription)
        try:
            yield subscription
        finally:
            for kind in subscription.kinds:
                self._subscriptions[kind].discard(subscription)

    def publish(self, changes: Sequence[Change]) -> None:
        """Hand changes to the subscriptions of their kinds."""
        for change in changes:
            for subscription in self._subscriptions[change.kind]:
                subscription.put(change)


def to_text(change: Change) -> str:
    """A change as PostgreSQL carries it."""
    return msgspec.json.encode(change).decode()


class PostgresListener:
    """Receives what any replica changes, on a connection of its own that it opens again when it is lost."""

    def __init__(self, database: Database, hub: ChangeHub) -> None:
        self._database = database
        self._hub = hub
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; every change that commits after this is received, or made up for by ANYTHING.

        Raises:
            StoreUnavailableError: the first connection cannot be made.
        """
        listens: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(listens))
        await listens

    async def stop(self) -> None:
        """Stop listening. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self, listens: asyncio.Future[None]) -> None:
        num_failures = 0
        outage = Outage(logger, "hear of changes")
        while True:
            try:
                with translated():
                    async for _ in self._listen():
                        num_failures = 0
                        outage.note_success()
                        if listens.done():
                            self._hub.publish([Change(ChangeKind.ANYTHING)])
                        else:
                            listens.set_result(None)
            except Exception as error:
                # No error may end this: a replica must go on listening.
                if not listens.done():
                    listens.set_exception(error)
                    return
                outage.note_failure(error)
            else:
                outage.note_failure(StoreUnavailableError(RECONNECT_SECONDS[0]))
            await asyncio.sleep(RECONNECT_SECONDS[min(num_failures, len(RECONNECT_SECONDS) - 1)])
            num_failures += 1

    async def _listen(self) -> AsyncIterator[None]:
        """Yield once when the connection listens; return when it is lost."""
        async with self._database.listening() as driver:
            is_lost = asyncio.Event()
            driver.add_termination_listener(lambda _: is_lost.set())
            await driver.add_listener(CHANNEL, self._on_notification)
            yield
            while not await wait_at_most(is_lost, CHECK_SECONDS):
                # A peer that vanished sends nothing; nor does a host that the others have left.
                if not await self._database.is_heard_by(driver):
                    return

    def _on_notification(self, driver: asyncpg.Connection, pid: int, channel: str, text: str) -> None:
        self._hub.publish([_decoder.decode(text)])
