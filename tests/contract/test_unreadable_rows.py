"""Rows that a newer version of the service, or a hand, wrote: each fails its own job and no other."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from hidream_grpc.errors import JobInternalError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import OWNER, StoreDatabase, added, claimed, ids, new_job, queue_order, started

DAMAGES = {
    "a state of a newer version": "state = 'PAUSED'",
    "a stage of a newer version": """progress_document = '{"stage": "UPSCALING"}'""",
    "an error of a newer version": """progress_document = '{"error": {"name": "NewError", "facts": {}}}'""",
    "no JSON": "progress_document = 'x'",
    "a submission that is no JSON": "submission = '{'",
    "a priority of a newer version": """submission = replace(submission, '"priority":2', '"priority":9')""",
    "a reason to cancel of a newer version": "cancel_reason = 'BORED'",
}


async def damage(database: StoreDatabase, job: Job, how: str) -> None:
    engine = create_async_engine(database.url)
    try:
        async with engine.begin() as connection:
            statement = f"UPDATE jobs SET {how} WHERE job_id = '{job.job_id}'"
            assert (await connection.exec_driver_sql(statement)).rowcount == 1
    finally:
        await engine.dispose()


@pytest.mark.parametrize("how", [pytest.param(how, id=name) for name, how in DAMAGES.items()])
async def test_a_row_that_cannot_be_read_fails_its_job_alone_with_an_error_id(
    store: SqlJobStore, database: StoreDatabase, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, broken, after = await added(store, new_job(), new_job(), new_job())
    await damage(database, broken, how)
    with caplog.at_level(logging.ERROR):
        claims = await claimed(store, limit=5)
    assert ids(claims) == [before.job_id, after.job_id]
    ended = await store.get(OWNER, broken.job_id)
    assert ended.state is JobState.FAILED
    assert isinstance(ended.error, JobInternalError)
    assert ended.error.error_id in [getattr(record, "error_id", None) for record in caplog.records]
    listed = (await store.list(OWNER)).jobs
    assert sorted(ids(listed)) == sorted(ids([before, broken, after]))
    again = await store.get(OWNER, broken.job_id)
    assert isinstance(again.error, JobInternalError)
    assert (again.error.error_id, again.end_time) == (ended.error.error_id, ended.end_time)
    assert await claimed(store, limit=5) == ()
    await store.delete(OWNER, broken.job_id)


async def test_a_row_that_became_unreadable_while_its_replica_lives_is_no_end(
    store: SqlJobStore, database: StoreDatabase
) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    await damage(database, job, "progress_document = 'x'")
    with pytest.raises(JobInternalError):
        await store.get(OWNER, job.job_id)
    with pytest.raises(JobInternalError):
        await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    await store.save(started(job))
    assert (await store.get(OWNER, job.job_id)).state is JobState.RUNNING


async def test_an_unreadable_row_leaves_the_order_of_the_queue_to_the_others(
    store: SqlJobStore, database: StoreDatabase
) -> None:
    broken, other = await added(store, new_job(), new_job())
    await damage(database, broken, "submission = '{'")
    assert other.job_id in await queue_order(store)
    assert {job.job_id for job in await store.get_all(ids([broken, other]))} == set(ids([broken, other]))
