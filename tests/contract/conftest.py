from __future__ import annotations

import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import StoreDatabase
from tests.support.postgres import PostgresServer
from tests.support.s3_server import BUCKET, S3Server, running_s3_server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the newest schema and no jobs, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "jobs.sqlite"
    async with StoreDatabase(f"sqlite+aiosqlite:///{path}", is_file=True).opened():
        return path


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def migrated_url(postgres: PostgresServer) -> AsyncIterator[str]:
    """A PostgreSQL database with the newest schema and no jobs, to be copied."""
    with postgres.database() as url:
        async with StoreDatabase(url, is_file=False).opened():
            pass
        yield url


@pytest.fixture
def sqlite_database(tmp_path: Path, migrated_file: Path) -> StoreDatabase:
    """A file without jobs."""
    path = shutil.copy(migrated_file, tmp_path / "jobs.sqlite")
    return StoreDatabase(f"sqlite+aiosqlite:///{path}", is_file=True)


@pytest.fixture
def postgres_database(postgres: PostgresServer, migrated_url: str) -> Iterator[StoreDatabase]:
    """A database of the running server without jobs."""
    with postgres.database(copied_from=migrated_url) as url:
        yield StoreDatabase(url, is_file=False)


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> StoreDatabase:
    """A database without jobs, of each kind."""
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
