"""What a database's failure means to us. Nothing above the store sees an exception of a driver."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from hidream_grpc.errors import HiDreamError, StoreFullError, StoreUnavailableError

UNAVAILABLE_RETRY_SECONDS = 1.0
FULL_RETRY_SECONDS = 5.0

_POSTGRESQL_DISK_FULL = "53100"
# Classes of SQLSTATE: connection, transaction rollback, resources, intervention of the operator, system;
# and a server that has become read-only.
_POSTGRESQL_UNAVAILABLE = ("08", "25006", "40", "53", "55P03", "57", "58")
_SQLITE_UNAVAILABLE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)
_SQLITE_PRIMARY_CODE = 0xFF


@contextmanager
def translated() -> Iterator[None]:
    """Turn failures of the database into ours; what is a mistake in our code passes as it is.

    Raises:
        StoreUnavailableError: the database cannot be reached, or not written now.
        StoreFullError: the database has no room.
    """
    try:
        yield
    except DBAPIError as error:
        if meaning := _meaning(error):
            raise meaning from error
        raise
    except (PoolTimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        # A connection that cannot be opened: not wrapped by SQLAlchemy.
        raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS) from error


def _meaning(error: DBAPIError) -> HiDreamError | None:
    cause: BaseException | None = error.orig
    state = getattr(cause, "sqlstate", None) or ""
    code = getattr(cause, "sqlite_errorcode", 0) & _SQLITE_PRIMARY_CODE
    if state == _POSTGRESQL_DISK_FULL or code == sqlite3.SQLITE_FULL:
        return StoreFullError(FULL_RETRY_SECONDS)
    if (
        error.connection_invalidated
        or state.startswith(_POSTGRESQL_UNAVAILABLE)
        or code in _SQLITE_UNAVAILABLE
    ):
        return StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS)
    return None
