"""Databases of former versions of the service are brought to the newest schema with their jobs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import sqlalchemy as sa
from alembic.command import upgrade

from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store import migrate
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.store.rows import changed_columns, new_row
from hidream_grpc.traces import TraceContext
from tests.support.job_stores import (
    OWNER,
    ROOMY,
    StoreDatabase,
    added,
    claimed,
    connected,
    finished,
    ids,
    joined,
    new_job,
    started,
)

RENAMED = {"acceptance_number": "number", "progress_document": "run"}
TRACE = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")


@dataclass(frozen=True)
class FormerVersion:
    """How the tables were before a migration.

    Attributes:
        names: of columns of jobs that are named otherwise now, by their newest names.
        lacking: columns of jobs that came later.
        goes_on: whether its servers work beside those of the next version.
    """

    revision: str
    names: dict[str, str]
    lacking: frozenset[str]
    goes_on: bool


FORMER_VERSIONS = [
    FormerVersion("0002", RENAMED, frozenset({"trace"}), goes_on=False),
    FormerVersion("0003", {}, frozenset({"trace"}), goes_on=True),
]


def migrate_to(revision: str, connection: sa.Connection) -> None:
    config = migrate._config()
    config.attributes["connection"] = connection
    upgrade(config, revision)


def rows_of_all_tables(connection: sa.Connection) -> dict[str, list[dict[str, object]]]:
    tables = sa.MetaData()
    tables.reflect(connection)
    return {
        table.name: [dict(row._mapping) for row in connection.execute(sa.select(table))]
        for table in tables.sorted_tables
        if table.name != "alembic_version"
    }


def insert(connection: sa.Connection, rows: dict[str, list[dict[str, object]]]) -> None:
    tables = sa.MetaData()
    tables.reflect(connection)
    for name, of_table in rows.items():
        connection.execute(sa.delete(tables.tables[name]))
        if of_table:
            connection.execute(sa.insert(tables.tables[name]), of_table)


async def take_back(database: StoreDatabase, former: FormerVersion) -> None:
    """Make all tables anew as the former version had them, with what is in them now."""
    async with connected(database) as connection:
        rows = await connection.run_sync(rows_of_all_tables)
    rows["jobs"] = [
        {former.names.get(name, name): value for name, value in row.items() if name not in former.lacking}
        for row in rows["jobs"]
    ]
    async with connected(database) as connection:
        for name in ("alembic_version", *reversed(rows)):
            await connection.exec_driver_sql(f"DROP TABLE {name}")
        await connection.run_sync(lambda sync: migrate_to(former.revision, sync))
        await connection.run_sync(insert, rows)


@pytest.mark.parametrize("former", FORMER_VERSIONS, ids=lambda former: former.revision)
async def test_jobs_of_the_former_version_are_kept_and_those_of_its_servers_can_be_claimed(
    database: StoreDatabase, former: FormerVersion
) -> None:
    async with database.opened() as store:
        (done,) = await added(store, new_job(labels={"team": "x"}))
        (claim,) = await claimed(store, "former replica")
        done = await finished(store, claim)
        running = new_job()
        await store.add([running], ROOMY, AttachedCall("call", "former replica"))
        (begun,) = await claimed(store, "former replica")
        begun = started(begun)
        await store.save(begun)
        (waiting,) = await added(store, new_job())
    await take_back(database, former)
    for _ in range(2):
        async with database.opened() as store:
            assert await store.get(OWNER, done.job_id) == done
            assert await store.get(OWNER, begun.job_id) == begun
            replica_ids = [record.replica_id for record in await store.replicas()]
            # A file has one server, so whoever is in it is gone.
            goes_on = former.goes_on and not database.is_file
            assert replica_ids == (["former replica"] if goes_on else [])
            assert (await store.list(OWNER, (), {"team": "x"}, 10, "")).jobs == (done,)
            page = await store.list(OWNER, (), {}, 2, "")
            assert ids(page.jobs) == [waiting.job_id, begun.job_id]
            rest = await store.list(OWNER, (), {}, 2, page.next_page_token)
            assert ids(rest.jobs) == [done.job_id]
    async with database.opened() as store:
        if former.goes_on:
            await store.remove_replica("former replica")
        again, first = await claimed(store, "new replica", limit=2)
        assert (again.job_id, again.claim_number) == (begun.job_id, begun.claim_number + 1)
        assert again.state is JobState.RUNNING
        assert first.job_id == waiting.job_id
        if database.is_file:
            # PostgreSQL gives numbers from a sequence, which this test has made anew.
            (newest,) = await added(store, new_job())
            assert ids((await store.list(OWNER, (), {}, 1, "")).jobs) == [newest.job_id]


async def test_servers_of_the_former_version_go_on_beside_a_new_one(postgres_database: StoreDatabase) -> None:
    database = postgres_database
    (former,) = (version for version in FORMER_VERSIONS if version.goes_on)
    async with database.opened() as store:
        await joined(store, "former replica")
    await take_back(database, former)
    async with connected(database) as connection:
        jobs = await connection.run_sync(lambda sync: sa.Table("jobs", sa.MetaData(), autoload_with=sync))
    assert not former.lacking & set(jobs.c.keys())
    async with database.opened() as store:
        (traced,) = await added(store, replace(new_job(), trace=TRACE))
        of_former = new_job()
        begun = started(replace(traced, claim_number=1))
        row = {name: value for name, value in new_row(of_former).items() if name not in former.lacking}
        claim = {"replica_id": "former replica", "claim_number": jobs.c.claim_number + 1}
        async with connected(database) as connection:
            await connection.execute(sa.insert(jobs).values(row))
            for values in (claim, changed_columns(begun)):
                update = sa.update(jobs).where(jobs.c.job_id == traced.job_id).values(values)
                assert (await connection.execute(update)).rowcount == 1
            read = (await connection.execute(sa.select(jobs))).all()
        assert {row.job_id for row in read} == {traced.job_id, of_former.job_id}
        assert await store.get(OWNER, traced.job_id) == begun
        assert ids(await claimed(store, "new replica", limit=2)) == [of_former.job_id]
        await store.remove_replica("former replica")
        (again,) = await claimed(store, "new replica", limit=2)
        assert (again.job_id, again.claim_number, again.trace) == (traced.job_id, 2, TRACE)
