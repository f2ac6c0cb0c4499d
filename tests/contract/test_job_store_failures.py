"""What a job store tells when its database fails, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa

from hidream_grpc.background import cause_of
from hidream_grpc.errors import (
    StoreFullError,
    StoreUnavailableError,
    StoreUnusableError,
)
from hidream_grpc.jobs.job import CancelReason
from hidream_grpc.jobs.store import failures as store_failures
from hidream_grpc.jobs.store import postgresql, sqlite
from hidream_grpc.jobs.store.changes import ChangeKind
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import (
    MODEL,
    OWNER,
    StoreDatabase,
    added,
    claimed,
    connected,
    new_job,
    started,
    told,
    until,
    with_image,
)
from tests.support.postgres import PostgresServer


async def test_a_lost_database_is_told_and_heals(
    postgres: PostgresServer, postgres_database: StoreDatabase
) -> None:
    async with postgres_database.opened() as store:
        (job,) = await added(store, new_job())
        await asyncio.gather(*(store.get(None, job.job_id) for _ in range(8)))
        with store.subscribe() as changes:
            postgres.stop()
            try:
                for attempt in (
                    store.get(None, job.job_id),
                    added(store, new_job()),
                    store.publish([("x", b"")]),
                ):
                    with pytest.raises(StoreUnavailableError) as caught:
                        await attempt
                    assert caught.value.retry_after_seconds > 0.0
            finally:
                postgres.start()
            assert await store.get(None, job.job_id) == job
            await until(changes, ChangeKind.ANYTHING)
            (later,) = await added(store, new_job())
            await until(changes, ChangeKind.ADDED, later.job_id)


async def test_connections_that_the_database_cuts_off_are_told_and_replaced(
    postgres: PostgresServer, postgres_database: StoreDatabase
) -> None:
    async with postgres_database.opened() as store:
        with store.subscribe() as changes:
            postgres.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid();",
                postgres_database.url,
            )
            await until(changes, ChangeKind.ANYTHING)
            assert await told(store) is None


async def test_a_database_that_is_not_there_at_the_start_is_told(
    postgres: PostgresServer, postgres_database: StoreDatabase
) -> None:
    postgres.stop()
    try:
        with pytest.raises(StoreUnusableError, match=r"^cannot connect to .+:5432: No such file"):
            async with postgres_database.opened():
                pass
    finally:
        postgres.start()
    async with postgres_database.opened() as store:
        assert await told(store) is None


async def test_a_database_that_hangs_is_told_and_heals(
    database: StoreDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "STATEMENT_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_SECONDS", 0.1)
    async with database.opened() as store, connected(database) as connection:
        lock = "BEGIN IMMEDIATE" if database.is_file else "LOCK TABLE jobs IN EXCLUSIVE MODE"
        await connection.execute(sa.text(lock))
        assert isinstance(await told(store), StoreUnavailableError)
        await connection.rollback()
        assert await told(store) is None


@pytest.mark.parametrize(
    ("break_it", "mend_it"),
    [
        pytest.param(
            "ALTER TABLE jobs RENAME TO jobs_away", "ALTER TABLE jobs_away RENAME TO jobs", id="no table"
        ),
        pytest.param(
            "ALTER TABLE jobs RENAME COLUMN progress_document TO elsewhere",
            "ALTER TABLE jobs RENAME COLUMN elsewhere TO progress_document",
            id="no column",
        ),
    ],
)
async def test_whatever_else_a_database_says_is_told_as_an_outage_and_heals(
    break_it: str, mend_it: str, database: StoreDatabase
) -> None:
    async with database.opened() as store:
        (job,) = await added(store, new_job())
        async with connected(database) as connection:
            await connection.execute(sa.text(break_it))
        for attempt in (
            store.get(None, job.job_id),
            added(store, new_job()),
            store.claim("replica-1", MODEL, 1),
            store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED),
        ):
            with pytest.raises(StoreUnavailableError) as caught:
                await attempt
            assert caught.value.retry_after_seconds > 0.0
        async with connected(database) as connection:
            await connection.execute(sa.text(mend_it))
        assert await store.get(None, job.job_id) == job
        assert await told(store) is None


LOST = "PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60);"


async def fail_at_first(database: StoreDatabase, failure: str, trigger: str) -> None:
    """Have a statement of PL/pgSQL fail the first three times that a trigger calls it."""
    function = "CREATE FUNCTION fail_at_first() RETURNS trigger LANGUAGE plpgsql AS"
    async with connected(database) as connection:
        for statement in (
            "CREATE SEQUENCE failures",
            f"{function} $$ BEGIN IF nextval('failures') < 4 THEN {failure} END IF; RETURN NEW; END $$",
            f"CREATE {trigger} FOR EACH ROW EXECUTE FUNCTION fail_at_first()",
        ):
            await connection.execute(sa.text(statement))


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param("RAISE EXCEPTION 'undone' USING ERRCODE = '40001';", id="serialization"),
        pytest.param("RAISE EXCEPTION 'undone' USING ERRCODE = '40P01';", id="deadlock"),
        pytest.param("RAISE EXCEPTION 'undone' USING ERRCODE = '23505';", id="unique"),
        pytest.param(LOST, id="lost session"),
    ],
)
async def test_a_transaction_that_the_database_undid_is_made_again(
    failure: str, postgres_database: StoreDatabase
) -> None:
    async with postgres_database.opened() as store:
        await fail_at_first(postgres_database, failure, "TRIGGER fails BEFORE INSERT OR UPDATE ON jobs")
        (job,) = await added(store, new_job())
        assert await store.get(None, job.job_id) == job
        assert (await store.counts()).total() == 1


async def test_a_commit_that_may_have_been_carried_out_is_not_made_again(
    postgres_database: StoreDatabase,
) -> None:
    async with postgres_database.opened() as store:
        at_commit = "CONSTRAINT TRIGGER fails AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED"
        await fail_at_first(postgres_database, LOST, at_commit)
        for _ in range(3):
            assert isinstance(await told(store), StoreUnavailableError)
        assert await told(store) is None
        assert (await store.counts()).total() == 1


async def test_a_transaction_that_is_undone_again_and_again_is_told_as_an_outage(
    postgres_database: StoreDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_failures, "MAX_CONFLICT_SECONDS", 0.001)
    async with postgres_database.opened() as store:
        async with connected(postgres_database) as connection:
            body = "$$ BEGIN RAISE EXCEPTION 'undone' USING ERRCODE = 'serialization_failure'; END $$"
            function = "CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS"
            await connection.execute(sa.text(f"{function} {body}"))
            trigger = "CREATE TRIGGER undo BEFORE INSERT OR UPDATE ON jobs EXECUTE FUNCTION undo()"
            await connection.execute(sa.text(trigger))
        error = await told(store)
        assert isinstance(error, StoreUnavailableError)
        assert cause_of(error).endswith("undone"), "the log says why"
        async with connected(postgres_database) as connection:
            await connection.execute(sa.text("DROP FUNCTION undo CASCADE"))
        assert await told(store) is None


async def test_a_full_disk_is_told_and_heals(database: StoreDatabase, store: SqlJobStore) -> None:
    (kept,) = await added(store, new_job())
    (running,) = await claimed(store)
    large = started(running)
    for _ in range(300):
        large = with_image(large)
    async with no_room(database, store):
        error = await told(store)
        assert isinstance(error, StoreFullError)
        assert error.retry_after_seconds > 0.0
        with pytest.raises(StoreFullError):
            await store.save(large)
        assert await store.get(None, kept.job_id) == running, "what was acknowledged is still told"
    await store.save(large)
    assert await store.get(None, kept.job_id) == large
    assert await told(store) is None


@asynccontextmanager
async def no_room(database: StoreDatabase, store: SqlJobStore) -> AsyncIterator[None]:
    """The database answers every write as it does on a full disk."""
    if database.is_file:
        async with full_file(store):
            yield
        return
    function = "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS"
    body = "$$ BEGIN RAISE EXCEPTION 'no space left' USING ERRCODE = 'disk_full'; END $$"
    trigger = "CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON jobs EXECUTE FUNCTION no_room()"
    async with connected(database) as connection:
        await connection.execute(sa.text(f"{function} {body}"))
        await connection.execute(sa.text(trigger))
    yield
    async with connected(database) as connection:
        await connection.execute(sa.text("DROP FUNCTION no_room CASCADE"))


@asynccontextmanager
async def full_file(store: SqlJobStore) -> AsyncIterator[None]:
    """Leave the file of a store no page to grow by, and fill those that it has."""
    engine = store._database._engine.sync_engine

    def forbid_growth(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # SQLite takes the present size

    def allow_growth(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")

    sa.event.listen(engine, "begin", forbid_growth)
    for _ in range(1000):
        if await told(store) is not None:
            break
    try:
        yield
    finally:
        sa.event.remove(engine, "begin", forbid_growth)
        sa.event.listen(engine, "begin", allow_growth)
