"""The schema that a job store is brought to when it is opened."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from hidream_grpc.errors import (
    StoreUnusableError,
    StoreVersionError,
)
from hidream_grpc.jobs.store.schema import metadata
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import (
    StoreDatabase,
    connected,
    told,
)
from tests.support.postgres import PostgresServer


@pytest.fixture
def sqlite_database(tmp_path: Path) -> StoreDatabase:
    """A file that is not there yet."""
    return StoreDatabase(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", is_file=True)


@pytest.fixture
def postgres_database(postgres: PostgresServer) -> Iterator[StoreDatabase]:
    """An empty database of the running server."""
    with postgres.database() as url:
        yield StoreDatabase(url, is_file=False)


async def test_the_migrations_make_the_tables_that_the_code_describes(database: StoreDatabase) -> None:
    async with database.opened():
        pass
    async with connected(database) as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), metadata)
        )
    assert differences == []


async def test_replicas_that_start_at_once_migrate_once(postgres_database: StoreDatabase) -> None:
    stores = [SqlJobStore(postgres_database.url) for _ in range(4)]
    try:
        await asyncio.gather(*(store.open() for store in stores))
        assert [await told(store) for store in stores] == [None] * 4
    finally:
        await asyncio.gather(*(store.close() for store in stores))


async def test_a_database_of_a_newer_version_is_refused(database: StoreDatabase) -> None:
    async with database.opened():
        pass
    async with connected(database) as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreVersionError, match="was written by a newer version of this service"):
        async with database.opened():
            pass


async def test_a_migration_that_fails_leaves_nothing(sqlite_database: StoreDatabase, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("CREATE TABLE turns (x)")
    connection.close()
    with pytest.raises(StoreUnusableError, match="table turns already exists"):
        async with sqlite_database.opened():
            pass
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        tables = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        connection.execute("DROP TABLE turns")
    connection.close()
    assert tables == {"turns"}
    async with sqlite_database.opened() as store:
        assert await told(store) is None
