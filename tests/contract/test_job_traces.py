"""The span of a job is kept with it, for the server that goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from hidream_grpc.jobs.store.schema import jobs
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.traces import TraceContext
from tests.support.job_stores import OWNER, StoreDatabase, added, claimed, connected, finished, new_job

TRACE = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", True, "00f067aa0ba902b7", "a=b")


async def test_a_job_keeps_its_trace_through_claims_restarts_and_its_end(database: StoreDatabase) -> None:
    async with database.opened() as store:
        (job,) = await added(store, replace(new_job(), trace=TRACE))
        assert job.trace == TRACE
    async with database.opened() as store:
        (claim,) = await claimed(store)
        assert claim.trace == TRACE
        await finished(store, claim)
        assert (await store.get(OWNER, job.job_id)).trace == TRACE


@pytest.mark.parametrize("text", ["{", '{"trace_id":"x","span_id":"y"}'], ids=["no JSON", "no ids"])
async def test_a_trace_that_cannot_be_read_costs_the_trace_and_not_the_job(
    store: SqlJobStore, database: StoreDatabase, text: str
) -> None:
    (job,) = await added(store, replace(new_job(), trace=TRACE))
    async with connected(database) as connection:
        await connection.execute(sa.update(jobs).values(trace=text))
    (claim,) = await claimed(store)
    assert (claim.job_id, claim.trace, claim.is_unreadable) == (job.job_id, None, False)
