"""How often the store waits for PostgreSQL's answer: each wait costs the event loop more than its query."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.failure.tcp_proxy import running_proxy
from tests.support.job_stores import OWNER, StoreDatabase, added, claimed, new_job, started
from tests.support.postgres import PostgresServer

CALLS: dict[str, tuple[Callable[[SqlJobStore, Job], Awaitable[object]], int]] = {
    "a query alone": (lambda store, job: store.get(OWNER, job.job_id), 1),
    "a publication alone": (lambda store, job: store.publish([(job.job_id, b"event")]), 1),
    "a row and its notification in a transaction": (lambda store, job: store.save(job), 4),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_waits_for_as_few_answers_of_the_database_as_it_can(
    call: str, postgres: PostgresServer, postgres_database: StoreDatabase
) -> None:
    name = postgres_database.url.partition("?")[0].rpartition("/")[2]
    ask, num_answers = CALLS[call]
    with running_proxy(postgres.socket_path) as proxy:
        url = f"postgresql+asyncpg://postgres@127.0.0.1:{proxy.port}/{name}"
        async with StoreDatabase(url, is_file=False).opened() as store:
            await added(store, new_job())
            (job,) = map(started, await claimed(store))
            # Their statements are prepared once a session.
            await ask(store, job)
            before = proxy.num_messages
            await ask(store, job)
            assert proxy.num_messages - before == num_answers
