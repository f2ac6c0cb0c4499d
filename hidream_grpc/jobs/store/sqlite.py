"""A SQLite file that is this process's alone, and must stay the one that was opened."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import aiosqlite
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from hidream_grpc.errors import StoreInUseError, StoreUnavailableError, StoreUnusableError
from hidream_grpc.jobs.folders import make_writable
from hidream_grpc.jobs.store.failures import UNAVAILABLE_RETRY_SECONDS

BUSY_TIMEOUT_SECONDS = 5.0
IS_WRITE = "hidream_is_write"
"""The execution option of a connection whose next transaction writes."""

BEGIN, BEGIN_WRITE = "BEGIN", "BEGIN IMMEDIATE"

# SQLite's own limit of 512, less what it appends to the name.
_MAX_PATH_BYTES = 504
_ITERATION_ROWS = 64


class StoreFiles:
    """The files of a job store: `jobs.sqlite`, `-wal`, `-shm`, and the lock that keeps other servers out.

    Writes to a file that was removed or replaced are lost when the process ends. SQLite locks `-shm`:
    another program that finds a new one there writes at the same time, and damages the file.
    """

    def __init__(self, path: Path) -> None:
        self._name_files(path)
        self._lock_descriptor: int | None = None
        self._opened: dict[Path, tuple[int, int]] = {}

    def _name_files(self, path: Path) -> None:
        self._path = path
        self._sqlite_paths = (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm")))
        self._lock_path = path.with_name(path.name + ".lock")

    def take(self) -> None:
        """Keep other servers out, before the first connection.

        Raises:
            StoreInUseError: another server has the file.
            StoreUnusableError: the file, or its folder, cannot be read and written.
        """
        try:
            if self._path.is_symlink():
                # What it leads to must be there: its disk may be away. The log and the lock are beside that.
                self._path.stat()
                self._name_files(self._path.resolve())
            make_writable(self._path.parent)
            if len(os.fsencode(self._path.resolve())) > _MAX_PATH_BYTES:
                raise OSError(
                    errno.ENAMETOOLONG, f"longer than the {_MAX_PATH_BYTES} bytes of SQLite", str(self._path)
                )
            self._lock_descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # SQLite says neither which of them it is, nor why. Not later: closing ends SQLite's locks.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            for path in self._sqlite_paths:
                if path.exists():
                    os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except BlockingIOError as error:
            self.give_free()
            raise StoreInUseError(self._path) from error
        except OSError as error:
            self.give_free()
            raise StoreUnusableError(f"{error.filename or self._path}: {error.strerror}") from error

    def note_opened(self) -> None:
        """Note which files these are; a connection must be open, and stay so."""
        self._opened = {path: _identity(path) for path in (*self._sqlite_paths, self._lock_path)}

    def check(self) -> None:
        """Raise StoreUnavailableError while one of the files is not there, or is another one, or unknown."""
        for path, identity in self._opened.items():
            cause: OSError | None = None
            try:
                is_same = _identity(path) == identity
            except (FileNotFoundError, NotADirectoryError):
                is_same = False
            except OSError as error:
                is_same = False
                cause = OSError(f"{path}: {error.strerror}")
            if not is_same:
                raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS) from cause or FileNotFoundError(
                    f"{path} was removed or replaced while it is in use: put it back, or restart the server"
                )

    def give_free(self) -> None:
        """Give the file free for other servers; may be called twice."""
        self._opened = {}
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def sqlite_engine(path: Path) -> AsyncEngine:
    """An engine whose commits survive a loss of power."""

    async def connect() -> aiosqlite.Connection:
        # What may fail is done before there is a thread of the driver, which outlives its failures.
        opened = await asyncio.to_thread(_opened, path)
        connection = _Connection(lambda: opened, _ITERATION_ROWS)
        # As SQLAlchemy does: a disk that hangs must not keep the process.
        connection._thread.daemon = True
        return await connection

    engine = create_async_engine("sqlite+aiosqlite:///file", async_creator=connect)

    @sa.event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        is_write = connection.get_execution_options().get(IS_WRITE, False)
        connection.exec_driver_sql(BEGIN_WRITE if is_write else BEGIN)

    return engine


def _opened(path: Path) -> sqlite3.Connection:
    # Transactions are begun above, where the driver would begin them too late.
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection


class _Connection(aiosqlite.Connection):
    """Goes to its thread once for a statement and its rows, and not at all to begin, or to end nothing.

    Each way there and back costs more than most statements: a turn of the event loop, and two threads that
    wait for each other. The driver's own connection goes nine times for a transaction of one statement.

    Attributes:
        due_begin: begins the transaction of the next statement, with which it goes to the thread.
    """

    due_begin: str | None = None

    def cursor(self) -> Any:
        """A cursor, without a visit to the thread."""
        return _Cursor(self)

    async def commit(self) -> None:
        """Commit the transaction, where there is one."""
        self.due_begin = None
        if self.in_transaction:
            await super().commit()

    async def rollback(self) -> None:
        """Roll the transaction back, where there is one."""
        self.due_begin = None
        if self.in_transaction:
            await super().rollback()


class _Cursor:
    """What SQLAlchemy's dialect asks of a cursor; its statement has ended, and its rows are read."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        # The driver has no types for it.
        self._in_thread: Any = connection._execute
        self._rows: list[Any] = []
        self.description: Any = None
        self.rowcount = -1
        self.lastrowid: int | None = None
        self.arraysize = 1

    async def __aenter__(self) -> Self:
        return self

    async def execute(self, statement: str, parameters: Any = ()) -> None:
        """Execute a statement, and read its rows."""
        if statement in (BEGIN, BEGIN_WRITE):
            self._connection.due_begin = statement
            return
        await self._in_thread(self._run, sqlite3.Cursor.execute, statement, parameters)

    async def executemany(self, statement: str, parameters: Any) -> None:
        """Execute a statement once for each of the parameters."""
        await self._in_thread(self._run, sqlite3.Cursor.executemany, statement, parameters)

    async def fetchall(self) -> list[Any]:
        """The rows."""
        return self._rows

    async def close(self) -> None:
        """Nothing is open any more."""

    def _run(self, execute: Callable[..., sqlite3.Cursor], statement: str, parameters: Any) -> None:
        """In the thread."""
        cursor = self._connection._conn.cursor()
        try:
            if (begin := self._connection.due_begin) is not None:
                self._connection.due_begin = None
                cursor.execute(begin)
            execute(cursor, statement, parameters)
            self.description = cursor.description
            self._rows = cursor.fetchall() if cursor.description else []
            self.rowcount, self.lastrowid = cursor.rowcount, cursor.lastrowid
        finally:
            cursor.close()
