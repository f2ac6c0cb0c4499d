"""Translates the failures of databases: nothing above the store sees an exception of a driver."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import asyncpg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoFreeConnectionError

from hidream_grpc.errors import StoreFullError, StoreUnavailableError

UNAVAILABLE_RETRY_SECONDS = 1.0
FULL_RETRY_SECONDS = 5.0
MAX_CONFLICTS = 20
MAX_CONFLICT_SECONDS = 0.05

T = TypeVar("T")

_POSTGRESQL_DISK_FULL = "53100"
# Serialization failure, deadlock, and a key that another transaction has inserted meanwhile.
_POSTGRESQL_CONFLICTS = ("40001", "40P01", "23505")
POSTGRESQL_READ_ONLY = "25006"
"""What is written is refused, and nothing was changed: the host is a standby, or about to become one."""
_SQLITE_PRIMARY_CODE = 0xFF


class TransactionConflict(Exception):  # noqa: N818  (the caller's sign to begin anew; it leaves no method)
    """The database has undone a transaction, which may succeed when it is made again."""


@contextmanager
def translated() -> Iterator[None]:
    """Turn failures of the database into errors of the service.

    A failure that is not foreseen here counts as an outage: a right that was revoked, a table that is gone,
    a password that was changed. Each can be put right without a restart.

    Raises:
        StoreUnavailableError: the database cannot be reached, or not used now.
        StoreFullError: the database has no room.
        TransactionConflict: the transaction is to be made again.
    """
    try:
        yield
    except DBAPIError as error:
        raise _meaning(error) from error
    except NoFreeConnectionError:
        # SQLAlchemy's own text is about its pool.
        cause = NoFreeConnectionError("no session was free in time")
        raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS) from cause
    except TimeoutError as error:
        reason = error if str(error) else TimeoutError("no answer in time")
        raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS) from reason
    except (
        SQLAlchemyError,
        OSError,
        asyncpg.PostgresError,
        asyncpg.InterfaceError,
        asyncpg.InternalClientError,
    ) as error:
        # A connection that cannot be opened is not wrapped by SQLAlchemy; nor is a wait for one.
        raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS) from error


@contextmanager
def made_again_when_lost() -> Iterator[None]:
    """Have a transaction made again whose session is lost before the commit: nothing of it lasts.

    A session of the pool may have ended long before, with its host or in a pause of this process. To ask
    each one first whether it lives would cost an answer of the database a transaction.

    Raises:
        TransactionConflict: the session is lost; those that come from the pool afterwards are new.
    """
    try:
        yield
    except DBAPIError as error:
        if error.connection_invalidated:
            raise TransactionConflict from error
        raise


async def begun_anew(transact: Callable[[], Awaitable[T]]) -> T:
    """Make a transaction, and make it again for as long as it meets conflicts.

    Raises:
        StoreUnavailableError: it met nothing else.
    """
    cause: BaseException | None = None
    for _ in range(MAX_CONFLICTS):
        try:
            return await transact()
        except TransactionConflict as conflict:
            cause = conflict.__cause__
            # Two that undo each other must not begin again at the same moment.
            await asyncio.sleep(random.uniform(0, MAX_CONFLICT_SECONDS))
    raise StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS) from cause


def has_no_free_connection(error: Exception) -> bool:
    """Whether the database was not even asked: other calls had all connections for too long."""
    return isinstance(error.__cause__, NoFreeConnectionError)


def _meaning(error: DBAPIError) -> Exception:
    cause: BaseException | None = error.orig
    state = getattr(cause, "sqlstate", None) or ""
    code = getattr(cause, "sqlite_errorcode", 0) & _SQLITE_PRIMARY_CODE
    if state == _POSTGRESQL_DISK_FULL or code == sqlite3.SQLITE_FULL:
        return StoreFullError(FULL_RETRY_SECONDS)
    if state in _POSTGRESQL_CONFLICTS or state == POSTGRESQL_READ_ONLY:
        # The next try of one that was read-only connects anew, maybe to another host.
        return TransactionConflict()
    return StoreUnavailableError(UNAVAILABLE_RETRY_SECONDS)
