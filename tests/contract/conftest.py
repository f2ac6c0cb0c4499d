from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import StoreDatabase
from tests.support.postgres import PostgresServer
from tests.support.s3_server import BUCKET, S3Server, running_s3_server


@pytest.fixture
def sqlite_database(tmp_path: Path) -> StoreDatabase:
    """An empty file."""
    return StoreDatabase(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", is_file=True)


@pytest.fixture
def postgres_database(postgres: PostgresServer) -> Iterator[StoreDatabase]:
    """An empty database of the running server."""
    with postgres.database() as url:
        yield StoreDatabase(url, is_file=False)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> StoreDatabase:
    """An empty database of each kind."""
    database: StoreDatabase = request.getfixturevalue(f"{request.param}_database")
    return database


@pytest_asyncio.fixture
async def store(database: StoreDatabase) -> AsyncIterator[SqlJobStore]:
    async with database.opened() as store:
        yield store


@pytest_asyncio.fixture
async def other(database: StoreDatabase, store: SqlJobStore) -> AsyncIterator[SqlJobStore]:
    """The store as another replica has it; a SQLite file has one process, so there it is the same."""
    if database.is_file:
        yield store
    else:
        async with database.opened() as other:
            yield other


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3_location(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/of a test"
