"""A database that the former version of the service wrote is brought to the newest schema with its jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic.command import upgrade

from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store import migrate
from hidream_grpc.jobs.store.records import AttachedCall
from tests.support.job_stores import (
    OWNER,
    ROOMY,
    StoreDatabase,
    added,
    claimed,
    connected,
    finished,
    ids,
    new_job,
    started,
)

FORMER_REVISION = "0002"
FORMER_NAMES = {"acceptance_number": "number", "progress_document": "run"}
NEW_NAMES = {"trace"}


def migrate_to_former(connection: sa.Connection) -> None:
    config = migrate._config()
    config.attributes["connection"] = connection
    upgrade(config, FORMER_REVISION)


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


async def take_back_to_former_version(database: StoreDatabase) -> None:
    """Make all tables anew as the former version had them, with what is in them now."""
    async with connected(database) as connection:
        rows = await connection.run_sync(rows_of_all_tables)
    rows["jobs"] = [
        {FORMER_NAMES.get(name, name): value for name, value in row.items() if name not in NEW_NAMES}
        for row in rows["jobs"]
    ]
    async with connected(database) as connection:
        for name in ("alembic_version", *reversed(rows)):
            await connection.exec_driver_sql(f"DROP TABLE {name}")
        await connection.run_sync(migrate_to_former)
        await connection.run_sync(insert, rows)


async def test_jobs_of_the_former_version_are_kept_and_those_of_its_servers_can_be_claimed(
    database: StoreDatabase,
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
    await take_back_to_former_version(database)
    for _ in range(2):
        async with database.opened() as store:
            assert await store.get(OWNER, done.job_id) == done
            assert await store.get(OWNER, begun.job_id) == begun
            assert await store.replicas() == ()
            assert (await store.list(OWNER, (), {"team": "x"}, 10, "")).jobs == (done,)
            page = await store.list(OWNER, (), {}, 2, "")
            assert ids(page.jobs) == [waiting.job_id, begun.job_id]
            rest = await store.list(OWNER, (), {}, 2, page.next_page_token)
            assert ids(rest.jobs) == [done.job_id]
    async with database.opened() as store:
        again, first = await claimed(store, "new replica", limit=2)
        assert (again.job_id, again.claim_number) == (begun.job_id, begun.claim_number + 1)
        assert again.state is JobState.RUNNING
        assert first.job_id == waiting.job_id
        if database.is_file:
            # PostgreSQL gives numbers from a sequence, which this test has made anew.
            (newest,) = await added(store, new_job())
            assert ids((await store.list(OWNER, (), {}, 1, "")).jobs) == [newest.job_id]
