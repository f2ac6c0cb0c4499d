"""Transactions of the job store, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from enum import IntEnum
from pathlib import Path

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.background import cause_of
from hidream_grpc.errors import StoreUnavailableError, StoreUnusableError
from hidream_grpc.jobs.store.failures import TransactionConflict, begun_anew, made_again_when_lost, translated
from hidream_grpc.jobs.store.migrate import is_migrated, migrate
from hidream_grpc.jobs.store.postgresql import (
    PostgresConnector,
    hears,
    postgresql_engine,
    refuse_transaction_pooling,
)
from hidream_grpc.jobs.store.sqlite import IS_WRITE, StoreFiles, sqlite_engine
from hidream_grpc.jobs.store.url import SqliteFile, parse_store_url

CLOSE_SECONDS = 1.0


class Lock(IntEnum):
    """Work that only one replica at a time may do: numbers of PostgreSQL's advisory locks."""

    MIGRATE = 0x68696472
    ACCEPT = 0x68696473
    CLAIM = 0x68696474


class Database:
    """One database that is brought to the newest schema when it is opened."""

    def __init__(self, location: Path | str) -> None:
        """Know a database, without a connection to it.

        Args:
            location: the file of a SQLite database, or a URL as `--store` has it, see `parse_store_url`.

        Raises:
            ConfigurationError: what is wrong with the URL.
        """
        parsed = SqliteFile(location.absolute()) if isinstance(location, Path) else parse_store_url(location)
        self._files: StoreFiles | None = None
        self._connector: PostgresConnector | None = None
        if isinstance(parsed, SqliteFile):
            self._engine = self._reading_engine = sqlite_engine(parsed.path)
            self._files = StoreFiles(parsed.path)
            self._name = str(parsed.path)
        else:
            self._connector = PostgresConnector(parsed)
            self._engine = postgresql_engine(self._connector)
            # Its transactions are READ COMMITTED: of single queries they would only cost two answers more.
            self._reading_engine = self._engine.execution_options(isolation_level="AUTOCOMMIT")
            self._name = "the job store"
        # SQLite removes its log when the last connection is closed; this one stays.
        self._first_connection: AsyncConnection | None = None
        # SQLite has one writer; waiting here costs nothing, waiting there is polling.
        self._writer = asyncio.Lock()

    @property
    def is_sqlite(self) -> bool:
        """Whether the jobs are in a file that no other process has."""
        return self._files is not None

    async def open(self) -> None:
        """Take the file, where it is one, and run the migrations that are missing.

        Raises:
            StartupError: why this database cannot be the job store.
            StoreFullError: it has no room.
        """
        try:
            await self._open()
        except BaseException as error:
            await self.close()
            if isinstance(error, StoreUnavailableError | TransactionConflict):
                prefix = f"{self._name}: " if self.is_sqlite else ""
                raise StoreUnusableError(f"{prefix}{cause_of(error)}") from error
            raise

    async def _open(self) -> None:
        if self._files is not None:
            self._files.take()
        if self._connector is not None:
            with translated():
                await refuse_transaction_pooling(self._connector)
        async with self.read() as connection:
            is_current = await connection.run_sync(is_migrated, self._name)
        if not is_current:
            async with self.write() as connection:
                await self.lock(connection, Lock.MIGRATE)
                await connection.run_sync(migrate, self._name)
        if self._files is not None:
            with translated():
                self._first_connection = await self._engine.connect()
                self._files.note_opened()

    async def close(self) -> None:
        """Close all connections and give the file free. May be called twice."""
        with contextlib.suppress(TimeoutError):
            # A database that does not answer is not waited for.
            async with asyncio.timeout(CLOSE_SECONDS):
                if self._first_connection is not None:
                    await self._first_connection.close()
                    self._first_connection = None
                await self._engine.dispose()
        if self._files is not None:
            self._files.give_free()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncConnection]:
        """A connection for what writes nothing; only on SQLite do all its queries see the same."""
        with translated():
            self._check_files()
            async with self._reading_engine.connect() as connection, connection.begin():
                with made_again_when_lost():
                    yield connection

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncConnection]:
        """A transaction; what it changed is durable when the block has ended without an error."""
        with translated():
            if not self.is_sqlite:
                async with self._transaction() as connection:
                    yield connection
                return
            async with self._writer:
                self._check_files()
                async with self._transaction() as connection:
                    yield connection
                # The file may have been taken away just before the commit.
                self._check_files()

    async def lock(self, connection: AsyncConnection, lock: Lock) -> None:
        """Take a lock over all replicas until the transaction ends.

        Take it as late in a transaction as possible: a replica that is stopped meanwhile delays all others.
        """
        if not self.is_sqlite:
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock.value)))

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[asyncpg.Connection]:
        """A session of PostgreSQL to listen with, outside the pool."""
        assert self._connector is not None, "SQLite sends no notifications"
        async with self._connector.listening() as driver:
            yield driver

    async def is_heard_by(self, driver: asyncpg.Connection) -> bool:
        """Whether a notification sent here reaches a `listening` session, which may be at another host."""

        async def notify(channel: str) -> None:
            async with self.read() as connection:
                await connection.execute(sa.select(sa.func.pg_notify(channel, "")))

        return await hears(driver, lambda channel: begun_anew(lambda: notify(channel)))

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[AsyncConnection]:
        async with self._engine.connect() as connection:
            await connection.execution_options(**{IS_WRITE: True})
            async with connection.begin():
                # Not around the commit, which may have been carried out.
                with made_again_when_lost():
                    yield connection

    def _check_files(self) -> None:
        if self._files is not None:
            self._files.check()
