"""What the store reads does not grow with jobs that it has nothing to do with, as the database counts."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
import sqlalchemy as sa

from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import MODEL, OWNER, StoreDatabase, added, claimed, connected, joined, new_job

INSTRUCTIONS_PER_COUNT = 20
MANY = 1500


class SqliteWork:
    """Counts the instructions of SQLite's virtual machine, of all connections that are opened from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._counts = 0
        connect = sqlite3.connect

        def connect_counting(*args: Any, **options: Any) -> sqlite3.Connection:
            connection = connect(*args, **options)
            connection.set_progress_handler(self._count, INSTRUCTIONS_PER_COUNT)
            return connection

        monkeypatch.setattr(sqlite3, "connect", connect_counting)

    def _count(self) -> None:
        self._counts += 1

    def taken(self) -> int:
        """Instructions since this was asked last."""
        counts, self._counts = self._counts, 0
        return counts * INSTRUCTIONS_PER_COUNT


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> SqliteWork:
    return SqliteWork(monkeypatch)


async def add_ended(store: SqlJobStore, database: StoreDatabase, num_jobs: int) -> None:
    await added(store, *(new_job() for _ in range(num_jobs)))
    async with connected(database) as connection:
        await connection.execute(
            sa.text("UPDATE jobs SET state = 'SUCCEEDED', end_time = 1, claim_number = 1")
        )
        await connection.commit()


async def submit_and_claim(store: SqlJobStore, work: SqliteWork) -> int:
    work.taken()
    await added(store, new_job())
    await claimed(store, "a")
    return work.taken()


async def test_jobs_that_have_ended_cost_nothing_where_those_that_run_are_listed(
    sqlite_database: StoreDatabase, work: SqliteWork
) -> None:
    async with sqlite_database.opened() as store:
        await add_ended(store, sqlite_database, MANY)
        await added(store, new_job())
        for owner in (OWNER, None):
            work.taken()
            page = await store.list(owner, [JobState.QUEUED, JobState.RUNNING], {}, 10, "")
            assert len(page.jobs) == 1
            assert work.taken() < MANY


async def test_jobs_that_have_ended_cost_neither_a_submit_nor_a_claim_anything(
    sqlite_database: StoreDatabase, work: SqliteWork
) -> None:
    async with sqlite_database.opened() as store:
        await joined(store, "a")
        alone = await submit_and_claim(store, work)
        await add_ended(store, sqlite_database, MANY)
        assert await submit_and_claim(store, work) < 1.5 * alone


async def test_a_claim_looks_at_each_job_that_waits_but_reads_the_rows_of_few(
    sqlite_database: StoreDatabase, work: SqliteWork
) -> None:
    async with sqlite_database.opened() as store:
        await joined(store, "a")
        alone = await submit_and_claim(store, work)
        await added(store, *(new_job() for _ in range(MANY)))
        extra = await submit_and_claim(store, work) - alone
        assert extra < 60 * MANY


async def test_a_claim_of_jobs_that_postgresql_has_no_statistics_of_yet_looks_at_each_a_few_times(
    postgres_database: StoreDatabase,
) -> None:
    async with postgres_database.opened() as store:
        async with connected(postgres_database) as connection:
            await connection.execute(sa.text("ALTER TABLE jobs SET (autovacuum_enabled = off)"))
        await added(store, *(new_job() for _ in range(MANY)))
        async with connected(postgres_database) as connection:
            query = queries.first_to_claim(MODEL, max_jobs=16)
            text = query.compile(connection.sync_engine, compile_kwargs={"literal_binds": True})
            explained = await connection.execute(sa.text(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}"))
    (answer,) = explained.scalar_one()
    assert num_rows(answer["Plan"]) < 10 * MANY


def num_rows(node: dict[str, Any]) -> float:
    """Rows that the nodes of a plan have handed on."""
    return node["Actual Rows"] * node["Actual Loops"] + sum(map(num_rows, node.get("Plans", ())))
