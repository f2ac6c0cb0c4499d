"""Whether the job store counts as usable, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from hidream_grpc.errors import HiDreamError, StoreUnavailableError
from hidream_grpc.jobs.store import probe as store_probe
from hidream_grpc.jobs.store.probe import StoreProbe
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import MODEL, ROOMY, StoreDatabase, added, eventually, joined, new_job
from tests.support.postgres import PostgresServer

REPLICA = "replica-1"
ROLE = "of_few_rights"


@asynccontextmanager
async def probing(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch, max_outage_seconds: float = 0.5
) -> AsyncIterator[StoreProbe]:
    monkeypatch.setattr(store_probe, "PROBE_SECONDS", 0.02)
    await joined(store, REPLICA)
    probe = StoreProbe(store, lambda: REPLICA, max_outage_seconds, lambda: None)
    task = asyncio.create_task(probe.run())
    try:
        yield probe
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async def holds() -> bool:
        return condition()

    await eventually(holds)


@asynccontextmanager
async def callers(store: SqlJobStore) -> AsyncGenerator[None]:
    """Callers that submit and a replica that claims, again and again."""

    async def call() -> None:
        while True:
            with contextlib.suppress(HiDreamError):
                await store.add([new_job()], ROOMY, AttachedCall(new_job().job_id, REPLICA))
            with contextlib.suppress(HiDreamError):
                await store.claim(REPLICA, MODEL, 1)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(call())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_probe_leaves_nothing_behind(store: SqlJobStore) -> None:
    await joined(store, REPLICA)
    for is_in_doubt in (False, True):
        await store.probe(REPLICA, is_in_doubt)
    assert (await store.counts()).total() == 0
    assert await store.claim(REPLICA, MODEL, 1) == ()
    engine: AsyncEngine = store._database._engine
    async with engine.connect() as connection:
        for table in ("jobs", "job_labels", "attached_calls", "turns"):
            assert (await connection.execute(sa.text(f"SELECT count(*) FROM {table}"))).scalar_one() == 0


async def test_a_file_that_takes_no_byte_more_is_an_outage_until_it_does(
    sqlite_database: StoreDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with sqlite_database.opened() as store, probing(store, monkeypatch) as probe:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with pytest.raises(StoreUnavailableError):
                await added(store, new_job())
            await until(lambda: not probe.is_usable)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await until(lambda: probe.is_usable)
    assert caplog.text.count("health says NOT_SERVING") == 1
    assert caplog.text.count("health says SERVING") == 1


@pytest.mark.parametrize(
    "right", ["ALL ON SEQUENCE jobs_number_seq", "INSERT ON attached_calls", "UPDATE ON jobs"]
)
async def test_a_right_that_jobs_need_and_that_was_revoked_is_an_outage_though_calls_go_on(
    right: str,
    postgres: PostgresServer,
    postgres_database: StoreDatabase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = postgres_database.url
    async with postgres_database.opened():
        pass
    postgres.execute(
        f"DROP ROLE IF EXISTS {ROLE}; CREATE ROLE {ROLE} LOGIN;"
        f" GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE};"
        f" GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {ROLE};",
        url,
    )
    limited = StoreDatabase(str(sa.make_url(url).set(username=ROLE).render_as_string(False)), is_file=False)
    try:
        async with limited.opened() as store, probing(store, monkeypatch) as probe:
            async with callers(store):
                postgres.execute(f"REVOKE {right} FROM {ROLE};", url)
                await until(lambda: not probe.is_usable)
                postgres.execute(f"GRANT {right} TO {ROLE};", url)
                await until(lambda: probe.is_usable)
            # Nobody needs to call for it to be found.
            postgres.execute(f"REVOKE {right} FROM {ROLE};", url)
            await until(lambda: not probe.is_usable)
    finally:
        postgres.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE};", url)
    assert "cannot use the job store: the job store does not answer (permission denied for" in caplog.text
    assert caplog.text.count("health says NOT_SERVING") == 2
