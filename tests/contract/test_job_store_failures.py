"""What the job store keeps and tells when processes and databases fail, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from hidream_grpc.background import reason_of
from hidream_grpc.errors import (
    HiDreamError,
    StoreFullError,
    StoreInUseError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreVersionError,
)
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import changes as store_changes
from hidream_grpc.jobs.store import postgresql, sqlite
from hidream_grpc.jobs.store import store as store_module
from hidream_grpc.jobs.store.changes import MAX_PAYLOAD_BYTES, Change, ChangeKind, Subscription
from hidream_grpc.jobs.store.schema import metadata
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.contract import acknowledged_jobs
from tests.support.job_stores import (
    MODEL,
    OWNER,
    StoreDatabase,
    added,
    claimed,
    finished,
    ids,
    new_job,
    started,
    with_image,
)
from tests.support.postgres import PostgresServer

NUM_KILLS = 4
MAX_LINES_BEFORE_A_KILL = 60


@asynccontextmanager
async def connected(database: StoreDatabase) -> AsyncIterator[AsyncConnection]:
    """A connection beside the store, that knows nothing of it."""
    engine = create_async_engine(database.url)
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


async def until(changes: Subscription, kind: ChangeKind, job_id: str = "") -> Change:
    """The next change of this kind; those before it are passed over."""
    async with asyncio.timeout(20.0):
        async for change in changes:
            if (change.kind, change.job_id) == (kind, job_id):
                return change
    raise AssertionError("a subscription is endless")


async def told(store: SqlJobStore) -> HiDreamError | None:
    """How the store answers a caller now; None when it accepts a job."""
    try:
        await added(store, new_job())
    except HiDreamError as error:
        return error
    return None


# --- restarts -----------------------------------------------------------------------------------------


async def test_everything_is_there_after_a_restart(database: StoreDatabase) -> None:
    async with database.opened() as store:
        await added(store, *(new_job(labels={"a": "b"}) for _ in range(4)))
        done, running, untouched = await claimed(store, limit=3)
        done = await finished(store, done)
        running = with_image(started(running))
        await store.save(running)
        jobs = (await store.list(OWNER)).jobs
        token = (await store.list(OWNER, page_size=2)).next_page_token
    async with database.opened() as store:
        assert (await store.list(OWNER, labels={"a": "b"})).jobs == jobs
        assert (await store.list(OWNER, page_size=2, page_token=token)).jobs == jobs[2:]
        assert running in jobs
        assert done in jobs
        assert (await store.get(None, untouched.job_id)).state is JobState.QUEUED


async def test_what_ran_when_the_only_process_died_is_claimed_at_once(sqlite_database: StoreDatabase) -> None:
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (job,) = await claimed(store)
        await store.save(started(job))
    async with sqlite_database.opened() as store:
        (again,) = await claimed(store, "replica-2")
        assert (again.job_id, again.state, again.claim_number) == (job.job_id, JobState.RUNNING, 2)


async def test_two_servers_never_share_one_file(sqlite_database: StoreDatabase) -> None:
    async with sqlite_database.opened():
        with pytest.raises(StoreInUseError) as caught:
            async with sqlite_database.opened():
                pass
    assert str(caught.value).endswith("jobs.sqlite is in use by another server")
    async with sqlite_database.opened() as store:
        assert await told(store) is None


@pytest.mark.parametrize("seed", [1, 2])
async def test_after_sigkill_every_acknowledged_job_is_there(database: StoreDatabase, seed: int) -> None:
    generator = random.Random(seed)
    acknowledged: dict[str, str] = {}
    for _ in range(NUM_KILLS):
        num_lines = generator.randint(1, MAX_LINES_BEFORE_A_KILL)
        lines = await asyncio.to_thread(acknowledged_until_killed, database.url, num_lines)
        acknowledged.update({job_id: word for word, job_id in lines})
        async with database.opened() as store:
            kept = await kept_jobs(store)
            assert acknowledged.keys() <= kept.keys()
            assert all(
                kept[job_id].state is JobState.SUCCEEDED
                for job_id, word in acknowledged.items()
                if word == "succeeded"
            )
            assert_whole(kept)
    assert len(acknowledged) >= NUM_KILLS


def acknowledged_until_killed(url: str, num_lines: int) -> list[tuple[str, str]]:
    """What a process says of the jobs that it adds, when it is killed after so many lines."""
    command = [sys.executable, "-m", acknowledged_jobs.__name__, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.send_signal(signal.SIGKILL)
        # What was said before the kill counts, too.
        lines += process.stdout.read().splitlines(keepends=True)
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(word, job_id) for word, job_id in words]


async def kept_jobs(store: SqlJobStore) -> dict[str, Job]:
    """All jobs, over all pages."""
    page = await store.list(OWNER, page_size=50)
    kept = list(page.jobs)
    while page.next_page_token:
        page = await store.list(OWNER, page_size=50, page_token=page.next_page_token)
        kept += page.jobs
    return {job.job_id: job for job in kept}


def assert_whole(kept: dict[str, Job]) -> None:
    """No batch is there in part, and a job has its image if and only if it has succeeded."""
    batches = Counter(
        (job.submission.labels["batch"], job.submission.labels["size"]) for job in kept.values()
    )
    assert {int(size) for (_, size), count in batches.items() if count != int(size)} == set()
    for job in kept.values():
        assert (job.state is JobState.SUCCEEDED) == (len(job.images) == 1)


# --- changes ------------------------------------------------------------------------------------------


async def test_every_replica_hears_of_every_change(store: SqlJobStore, other: SqlJobStore) -> None:
    with other.subscribe() as heard:
        (job,) = await added(store, new_job())
        await until(heard, ChangeKind.ADDED, job.job_id)
        (mine,) = await claimed(store)
        await until(heard, ChangeKind.CHANGED, job.job_id)
        with store.subscribe() as heard_by_holder:
            await other.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
            await until(heard_by_holder, ChangeKind.CANCEL_REQUESTED, job.job_id)
        await store.release(mine)
        await until(heard, ChangeKind.CHANGED, job.job_id)
        await store.delete(OWNER, job.job_id)
        await until(heard, ChangeKind.DELETED, job.job_id)


async def test_a_large_batch_is_told_job_by_job_in_order(store: SqlJobStore, other: SqlJobStore) -> None:
    with other.subscribe() as heard:
        jobs = await added(store, *(new_job() for _ in range(300)))
        async with asyncio.timeout(20.0):
            changes = [await anext(heard) for _ in jobs]
    assert changes == [Change(ChangeKind.ADDED, job.job_id) for job in jobs]


async def test_what_is_published_reaches_every_replica_as_it_is(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    payload = random.Random(1).randbytes(MAX_PAYLOAD_BYTES)
    with other.subscribe() as heard, store.subscribe() as heard_by_itself:
        await store.publish("job-1", payload)
        assert (await until(heard, ChangeKind.PUBLISHED, "job-1")).payload == payload
        assert (await until(heard_by_itself, ChangeKind.PUBLISHED, "job-1")).payload == payload
    with pytest.raises(ValueError, match="at most 5500 bytes, is 5501"):
        await store.publish("job-1", payload + b"x")


async def test_what_failed_is_not_told(store: SqlJobStore, other: SqlJobStore) -> None:
    with other.subscribe() as heard:
        (job,) = await added(store, new_job(request_id="r1"))
        with pytest.raises(HiDreamError):
            await added(store, new_job(), new_job(request_id="r1", prompt="something else"))
        await store.publish("the end", b"")
        async with asyncio.timeout(20.0):
            changes = [await anext(heard) for _ in range(2)]
    assert [change.job_id for change in changes] == [job.job_id, "the end"]


async def test_a_reader_that_is_far_behind_is_told_to_read_everything_again(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_changes, "MAX_PENDING_CHANGES", 3)
    with store.subscribe() as slow, store.subscribe() as quick:
        for index in range(5):
            await store.publish(str(index), b"")
            await until(quick, ChangeKind.PUBLISHED, str(index))
        assert await anext(slow) == Change(ChangeKind.ANYTHING)
        assert (await anext(slow)).job_id == "4"


# --- a database that fails ----------------------------------------------------------------------------


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
                    store.publish("x", b""),
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
            "ALTER TABLE jobs RENAME COLUMN run TO ran",
            "ALTER TABLE jobs RENAME COLUMN ran TO run",
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


@pytest.mark.parametrize("state", ["40001", "40P01", "23505"], ids=["serialization", "deadlock", "unique"])
async def test_a_transaction_that_the_database_undid_is_made_again(
    state: str, postgres_database: StoreDatabase
) -> None:
    async with postgres_database.opened() as store:
        async with connected(postgres_database) as connection:
            await connection.execute(sa.text("CREATE SEQUENCE failures"))
            await connection.execute(
                sa.text(
                    "CREATE FUNCTION fail_at_first() RETURNS trigger LANGUAGE plpgsql AS"
                    " $$ BEGIN IF nextval('failures') < 4 THEN RAISE EXCEPTION 'undone'"
                    f" USING ERRCODE = '{state}'; END IF; RETURN NEW; END $$"
                )
            )
            await connection.execute(
                sa.text(
                    "CREATE TRIGGER fail_at_first BEFORE INSERT OR UPDATE ON jobs"
                    " FOR EACH ROW EXECUTE FUNCTION fail_at_first()"
                )
            )
        (job,) = await added(store, new_job())
        assert await store.get(None, job.job_id) == job
        assert (await store.counts()).total() == 1


async def test_a_transaction_that_is_undone_again_and_again_is_told_as_an_outage(
    postgres_database: StoreDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_CONFLICT_SECONDS", 0.001)
    async with postgres_database.opened() as store:
        async with connected(postgres_database) as connection:
            body = "$$ BEGIN RAISE EXCEPTION 'undone' USING ERRCODE = 'serialization_failure'; END $$"
            function = "CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS"
            await connection.execute(sa.text(f"{function} {body}"))
            trigger = "CREATE TRIGGER undo BEFORE INSERT OR UPDATE ON jobs EXECUTE FUNCTION undo()"
            await connection.execute(sa.text(trigger))
        assert isinstance(await told(store), StoreUnavailableError)
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


async def test_after_the_log_was_deleted_nothing_is_accepted_and_closing_keeps_what_was(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    async with sqlite_database.opened() as store:
        kept = await added(store, *(new_job() for _ in range(3)))
        (tmp_path / "jobs.sqlite-wal").unlink()
        assert isinstance(await told(store), StoreUnavailableError)
        with pytest.raises(StoreUnavailableError):
            await store.get(None, kept[0].job_id)
    async with sqlite_database.opened() as store:
        assert {*ids(await store.get_all(ids(kept)))} == {*ids(kept)}
        assert (await store.counts()).total() == len(kept)


@pytest.mark.parametrize("end", ["", "-wal", "-shm", ".lock"])
async def test_nothing_is_written_beside_a_file_that_is_not_the_one_that_was_opened(
    end: str, sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    path = tmp_path / f"jobs.sqlite{end}"
    async with sqlite_database.opened() as store:
        away = path.rename(tmp_path / "away")
        assert isinstance(await told(store), StoreUnavailableError)
        away.rename(path)
        assert await told(store) is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
async def test_why_a_file_cannot_be_looked_at_is_told(
    code: int, sqlite_database: StoreDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> NoReturn:
        raise OSError(code, os.strerror(code), str(path))

    async with sqlite_database.opened() as store:
        monkeypatch.setattr(sqlite, "_identity", fail)
        error = await told(store)
        assert error is not None
        path = tmp_path / "jobs.sqlite"
        assert reason_of(error) == f"the job store does not answer ({path}: {os.strerror(code)})"


async def test_a_job_that_was_committed_into_a_file_that_just_went_is_not_acknowledged(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    path, away = tmp_path / "jobs.sqlite", tmp_path / "away.sqlite"
    async with sqlite_database.opened() as store:
        engine = store._database._engine.sync_engine
        sa.event.listen(engine, "commit", lambda _: path.rename(away), once=True)
        error = await told(store)
        assert isinstance(error, StoreUnavailableError)
        assert reason_of(error) == (
            f"the job store does not answer ({path} was removed or replaced while it is in use: "
            "put it back, or restart the server)"
        )
        away.rename(path)
        assert await told(store) is None


# --- migrations ---------------------------------------------------------------------------------------


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
