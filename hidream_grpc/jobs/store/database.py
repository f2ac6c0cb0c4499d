"""Connections and transactions of the job store, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from hidream_grpc.errors import StoreInUseError
from hidream_grpc.jobs.store.failures import translated
from hidream_grpc.jobs.store.migrate import is_migrated, migrate

BUSY_TIMEOUT_SECONDS = 5.0
CONNECT_TIMEOUT_SECONDS = 5.0
STATEMENT_TIMEOUT_SECONDS = 15.0
CLOSE_SECONDS = 1.0
IDLE_IN_TRANSACTION_SECONDS = 5.0
"""PostgreSQL ends a session whose client says nothing for so long in the middle of a transaction: one that
was stopped while it held locks."""
_IS_WRITE = "hidream_is_write"


class Lock(IntEnum):
    """What must not be done twice at once over all replicas: numbers of PostgreSQL's advisory locks."""

    MIGRATE = 0x68696472
    ACCEPT = 0x68696473
    CLAIM = 0x68696474


class Database:
    """One database that is brought to the newest schema when it is opened."""

    def __init__(self, url: str) -> None:
        """Know a database, without a connection to it.

        Args:
            url: `sqlite+aiosqlite:////folder/jobs.sqlite` or `postgresql+asyncpg://…`.
        """
        parsed = sa.make_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self._engine = _sqlite_engine(parsed) if self.is_sqlite else _postgresql_engine(parsed)
        self._path = Path(parsed.database or "") if self.is_sqlite else None
        self._lock_descriptor: int | None = None
        # SQLite has one writer; waiting here costs nothing, waiting there is polling.
        self._writer = asyncio.Lock()

    async def open(self) -> None:
        """Take the file, where it is one, and run the migrations that are missing."""
        if self._path is not None:
            self._lock(self._path)
        try:
            async with self.read() as connection:
                is_current = await connection.run_sync(is_migrated)
            if not is_current:
                async with self.write() as connection:
                    await self.lock(connection, Lock.MIGRATE)
                    await connection.run_sync(migrate)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all connections and give the file free. May be called twice."""
        with contextlib.suppress(TimeoutError):
            # A database that does not answer is not waited for.
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._engine.dispose()
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncConnection]:
        """A transaction that changes nothing."""
        with translated():
            async with self._engine.connect() as connection, connection.begin():
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncConnection]:
        """A transaction; what it changed is durable when the block has ended without an error."""
        with translated():
            if self.is_sqlite:
                async with self._writer, self._transaction() as connection:
                    yield connection
            else:
                async with self._transaction() as connection:
                    yield connection

    async def lock(self, connection: AsyncConnection, lock: Lock) -> None:
        """Be the only one to do this, over all replicas, until the transaction ends.

        Take it as late in a transaction as can be: a replica that is stopped meanwhile holds up all others.
        """
        if not self.is_sqlite:
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock.value)))

    @asynccontextmanager
    async def connect(self) -> AsyncGenerator[AsyncConnection]:
        """A connection of one's own, outside of any transaction."""
        async with self._engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[AsyncConnection]:
        async with self._engine.connect() as connection:
            await connection.execution_options(**{_IS_WRITE: True})
            async with connection.begin():
                yield connection

    def _lock(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StoreInUseError(path) from error
        self._lock_descriptor = descriptor


def _postgresql_engine(url: sa.URL) -> AsyncEngine:
    return create_async_engine(
        url,
        # Not what the database or the role has as its default.
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,
        pool_timeout=STATEMENT_TIMEOUT_SECONDS,
        connect_args={
            "timeout": CONNECT_TIMEOUT_SECONDS,
            "command_timeout": STATEMENT_TIMEOUT_SECONDS,
            "server_settings": {
                "application_name": "hidream-grpc",
                "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS * 1000:.0f}",
                "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS * 1000:.0f}",
            },
        },
    )


def _sqlite_engine(url: sa.URL) -> AsyncEngine:
    engine = create_async_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})

    @sa.event.listens_for(engine.sync_engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        # Transactions are begun below, where the driver would begin them too late.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        is_write = connection.get_execution_options().get(_IS_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")

    return engine
