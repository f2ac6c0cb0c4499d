"""The job store: what is written here survives every process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.acceptance import JobAcceptance
from hidream_grpc.jobs.store.base import uninterrupted
from hidream_grpc.jobs.store.cancellation import JobCancellation
from hidream_grpc.jobs.store.changes import (
    ALL_KINDS,
    MAX_PAYLOAD_BYTES,
    Change,
    ChangeKind,
    PostgresListener,
    Subscription,
)
from hidream_grpc.jobs.store.claims import JobClaims
from hidream_grpc.jobs.store.database import Database
from hidream_grpc.jobs.store.reading import JobReading
from hidream_grpc.jobs.store.removal import JobRemoval
from hidream_grpc.jobs.store.replicas import ReplicaRegistry

CLOSE_SECONDS = 1.0


class SqlJobStore(JobAcceptance, JobReading, JobCancellation, JobClaims, ReplicaRegistry, JobRemoval):
    """Jobs in SQLite or PostgreSQL. What a method changed is durable when it returns.

    Every method may raise StoreUnavailableError (after a write: whether it was made is not known) or
    StoreFullError (nothing was changed); the store recovers without being opened again. A call whose caller
    is cancelled goes on to its end: the caller does not know what became of it.
    """

    def __init__(self, location: Path | str, end_observers: Sequence[Callable[[Job], None]] = ()) -> None:
        """Take the location of a store, without connecting to it.

        Args:
            location: the file of a SQLite database, or a URL as `--store` has it, see `parse_store_url`.
            end_observers: called with each job that this process has ended.

        Raises:
            ConfigurationError: what is wrong with the URL.
        """
        super().__init__(Database(location), end_observers)
        is_sqlite = self._database.is_sqlite
        self._listener = None if is_sqlite else PostgresListener(self._database, self._hub)

    async def open(self) -> None:
        """Bring the database to the newest schema and listen for changes.

        A SQLite file is this process's alone: all claims in it are of processes that are gone, and their
        jobs can be claimed at once.

        Raises:
            StoreInUseError: another server has the SQLite file open.
            StoreVersionError: a newer version of the service wrote the database.
            StoreUnusableError: a file, a right, a role or a host is not as it must be.
            ConfigurationError: what stands before the database delivers no notifications.
        """
        await self._database.open()
        try:
            if self._listener is not None:
                await self._listener.start()
            else:
                async with self._database.write() as connection:
                    for removal in queries.remove_all_replicas():
                        await connection.execute(removal)
            await self.follow_clock()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all connections, whether the database answers or not. May be called twice."""
        await self._calls.wait(CLOSE_SECONDS)
        if self._listener is not None:
            await self._listener.stop()
        await self._database.close()

    def subscribe(self, kinds: Collection[ChangeKind] = ALL_KINDS) -> AbstractContextManager[Subscription]:
        """Receive all that commits from now on: `with store.subscribe() as changes`, then `async for`.

        Read what is there after subscribing, and nothing is missed.

        Args:
            kinds: of the changes that are received; ANYTHING is always among them.
        """
        return self._hub.subscribe(kinds)

    @uninterrupted
    async def publish(self, payloads: Sequence[tuple[str, bytes]]) -> None:
        """Send all subscribers, of all replicas, payloads that are kept nowhere.

        Args:
            payloads: the job that each is about, and at most `changes.MAX_PAYLOAD_BYTES`.
        """
        for _, payload in payloads:
            if len(payload) > MAX_PAYLOAD_BYTES:
                raise ValueError(f"payload: must be at most {MAX_PAYLOAD_BYTES} bytes, is {len(payload)}")
        changes = [Change(ChangeKind.PUBLISHED, job_id, payload) for job_id, payload in payloads]
        if not self._database.is_sqlite:
            async with self._database.read() as connection:
                await self._notify(connection, changes)
        self._committed(changes)
