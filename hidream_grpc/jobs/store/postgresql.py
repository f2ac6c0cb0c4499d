"""Connections to PostgreSQL: to the host that accepts writes, and away from one that no longer does."""

from __future__ import annotations

import asyncio
import os
import ssl
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.jobs.retrying import wait_at_most
from hidream_grpc.jobs.store.failures import POSTGRESQL_READ_ONLY
from hidream_grpc.jobs.store.url import STORE_FLAG, PostgresDatabase, PostgresHost

STATEMENT_TIMEOUT_SECONDS = 15.0
IDLE_IN_TRANSACTION_SECONDS = 5.0
"""PostgreSQL ends a session whose client says nothing for so long in the middle of a transaction: one that
was stopped while it held locks."""
ECHO_TIMEOUT_SECONDS = 5.0
MAX_TRANSACTIONS = 5
"""At once, each with a session; one session more listens. Three servers fit into the 20 that PgBouncer has
as its default, and into the smallest databases of providers; most writes wait for one another anyway."""

# The errors of a statement that was prepared in another session than the one that runs it.
_STATEMENTS_OF_OTHERS = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)


class PostgresConnector:
    """Connects to the first host of a database that accepts writes, and begins with that host next time."""

    def __init__(self, database: PostgresDatabase) -> None:
        self._arguments = database.arguments
        # None is for libpq's environment variables. Each has its own time to answer.
        self._hosts: tuple[PostgresHost | None, ...] = database.hosts or (None,)
        self._listening: set[asyncpg.Connection] = set()

    async def connect(self, **arguments: Any) -> asyncpg.Connection:
        """Open a session without settings of this service; the arguments are those of `asyncpg.connect`."""
        reasons: list[str] = []
        for host in self._hosts:
            try:
                driver = await self._connect_to(host, arguments)
            except (OSError, asyncpg.PostgresError) as error:
                if len(self._hosts) == 1:
                    raise
                reasons.append(str(error) if isinstance(error, OSError) else f"{host}: {error}")
            else:
                self._hosts = (host, *(other for other in self._hosts if other != host))
                return driver
        raise ConnectionError("; ".join(reasons))

    async def connect_with_settings(self) -> asyncpg.Connection:
        """Open a session whose statements and transactions end in time."""
        driver = await self.connect()
        try:
            # By SQL: poolers refuse them as parameters of the connection.
            await driver.execute(
                f"SET statement_timeout = {STATEMENT_TIMEOUT_SECONDS * 1000:.0f}; "
                f"SET idle_in_transaction_session_timeout = {IDLE_IN_TRANSACTION_SECONDS * 1000:.0f}; "
                # Not what the database or the role has as its default.
                "SET default_transaction_isolation = 'read committed'"
            )
        except BaseException:
            driver.terminate()
            raise
        return driver

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[asyncpg.Connection]:
        """A session to listen with until the block ends, or until its host must be left."""
        # A peer that vanished sends nothing; the statements of this session take no time.
        driver = await self.connect(command_timeout=ECHO_TIMEOUT_SECONDS)
        self._listening.add(driver)
        try:
            yield driver
        finally:
            self._listening.discard(driver)
            driver.terminate()

    def leave_host(self) -> None:
        """Break the sessions that listen: others write elsewhere from now on."""
        for driver in tuple(self._listening):
            driver.terminate()

    async def _connect_to(self, host: PostgresHost | None, arguments: dict[str, Any]) -> asyncpg.Connection:
        address = {} if host is None else {"host": host.host, "port": host.port}
        try:
            return await asyncpg.connect(
                **address, **{**self._arguments, "command_timeout": STATEMENT_TIMEOUT_SECONDS, **arguments}
            )
        except TimeoutError:
            reason = f"no answer within {self._arguments['timeout']:g} s"
        except asyncpg.TargetServerAttributeNotMatched:
            reason = "the database is read-only"
        # A host name that cannot be one is a ValueError.
        except (OSError, ValueError) as error:
            reason = _reason_of(error)
        raise ConnectionError(f"cannot connect to {host or 'the database'}: {reason}")


def _reason_of(error: OSError | ValueError) -> str:
    """The system's reason why a connection failed; asyncio's own text names the address only."""
    code = getattr(error, "errno", None)
    if isinstance(code, int) and code > 0 and not isinstance(error, ssl.SSLError):
        return os.strerror(code)
    return getattr(error, "strerror", None) or str(error)


def postgresql_engine(connector: PostgresConnector) -> AsyncEngine:
    """An engine whose pool is emptied when one of its connections cannot be written any more."""
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connector.connect_with_settings,
        pool_size=MAX_TRANSACTIONS,
        max_overflow=0,
        pool_timeout=STATEMENT_TIMEOUT_SECONDS,
    )

    @sa.event.listens_for(engine.sync_engine, "handle_error")
    def _leave_read_only_host(context: sa.ExceptionContext) -> None:
        # After a failover the sockets to the old primary may stay open; SQLAlchemy then drops them all.
        if getattr(context.original_exception, "sqlstate", None) == POSTGRESQL_READ_ONLY:
            context.is_disconnect = True
            connector.leave_host()

    return engine


async def refuse_transaction_pooling(connector: PostgresConnector) -> None:
    """Refuse a pooler in transaction mode, behind which no notification arrives.

    Leaves no setting and no statement behind in a session that others may get.

    Raises:
        ConfigurationError: a notification does not reach the session that listens, or there are no two
            sessions.
    """
    try:
        is_heard = await _sessions_hear(connector)
    except TimeoutError:
        raise ConfigurationError(
            STORE_FLAG,
            f"no answer within {STATEMENT_TIMEOUT_SECONDS:g} s; a pooler must let each server have "
            f"{MAX_TRANSACTIONS + 1} sessions",
        ) from None
    if not is_heard:
        raise ConfigurationError(
            STORE_FLAG,
            "notifications do not arrive, as behind a connection pooler in transaction mode: "
            "name its port for session mode, or the database itself",
        )


async def _sessions_hear(connector: PostgresConnector) -> bool:
    """Whether one new session receives a notification of another one."""
    async with AsyncExitStack() as stack:
        sessions = []
        for _ in range(2):
            driver = await connector.connect(statement_cache_size=0)
            stack.callback(driver.terminate)
            sessions.append(driver)
        listening, notifying = sessions
        try:
            return await hears(listening, lambda channel: notifying.execute(f"NOTIFY {channel}"))
        except _STATEMENTS_OF_OTHERS:
            return False


async def hears(listening: asyncpg.Connection, notify: Callable[[str], Awaitable[object]]) -> bool:
    """Whether a session receives in time a notification on a channel of its own."""
    channel = f"hidream_echo_{uuid.uuid4().hex}"
    is_heard = asyncio.Event()

    def note(*_: object) -> None:
        is_heard.set()

    await listening.add_listener(channel, note)
    await notify(channel)
    await wait_at_most(is_heard, ECHO_TIMEOUT_SECONDS)
    await listening.remove_listener(channel, note)
    return is_heard.is_set()
