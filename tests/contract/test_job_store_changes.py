"""What a job store tells of changes to every replica, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from hidream_grpc.errors import (
    HiDreamError,
)
from hidream_grpc.jobs.job import CancelReason, StoredSnapshot
from hidream_grpc.jobs.store import changes as store_changes
from hidream_grpc.jobs.store.changes import MAX_PAYLOAD_BYTES, ROW_KINDS, Change, ChangeKind, job_added
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import (
    OWNER,
    added,
    claimed,
    new_job,
    started,
    until,
)


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
        await until(heard, ChangeKind.ADDED, job.job_id)
        await store.delete(OWNER, job.job_id)
        await until(heard, ChangeKind.DELETED, job.job_id)


async def test_a_large_batch_is_told_job_by_job_in_order(store: SqlJobStore, other: SqlJobStore) -> None:
    with other.subscribe() as heard:
        jobs = await added(store, *(new_job() for _ in range(300)))
        async with asyncio.timeout(20.0):
            changes = [await anext(heard) for _ in jobs]
    assert changes == [job_added(job) for job in jobs]


async def test_what_is_published_reaches_every_replica_as_it_is(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    payload = random.Random(1).randbytes(MAX_PAYLOAD_BYTES)
    with other.subscribe() as heard, store.subscribe() as heard_by_itself:
        await store.publish([("job-1", payload)])
        assert (await until(heard, ChangeKind.PUBLISHED, "job-1")).payload == payload
        assert (await until(heard_by_itself, ChangeKind.PUBLISHED, "job-1")).payload == payload
    with pytest.raises(ValueError, match="at most 5500 bytes, is 5501"):
        await store.publish([("job-1", payload + b"x")])


async def test_what_failed_is_not_told(store: SqlJobStore, other: SqlJobStore) -> None:
    with other.subscribe() as heard:
        (job,) = await added(store, new_job(request_id="r1"))
        with pytest.raises(HiDreamError):
            await added(store, new_job(), new_job(request_id="r1", prompt="something else"))
        await store.publish([("the end", b"")])
        async with asyncio.timeout(20.0):
            changes = [await anext(heard) for _ in range(2)]
    assert [change.job_id for change in changes] == [job.job_id, "the end"]


async def test_a_reader_that_is_far_behind_is_told_to_read_everything_again(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_changes, "MAX_PENDING_CHANGES", 3)
    with store.subscribe() as slow, store.subscribe() as quick:
        for index in range(5):
            await store.publish([(str(index), b"")])
            await until(quick, ChangeKind.PUBLISHED, str(index))
        assert await anext(slow) == Change(ChangeKind.ANYTHING)
        assert (await anext(slow)).job_id == "4"


async def test_a_subscription_of_some_kinds_is_woken_by_no_other(store: SqlJobStore) -> None:
    with store.subscribe(ROW_KINDS) as of_rows, store.subscribe() as of_all:
        (job,) = await added(store, new_job())
        (claim,) = await claimed(store)
        begun = started(claim)
        await store.save(begun)
        for _ in range(10):
            await store.publish([(job.job_id, b"progress")])
        await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
        # What only the next claim reads is news to nobody.
        await store.save(replace(begun, snapshot=StoredSnapshot(1, step=3)), is_news=False)
        await store.publish([("the end", b"")])
        await until(of_all, ChangeKind.PUBLISHED, "the end")
        assert [change.kind for change in of_rows.take_pending()] == [
            ChangeKind.ADDED,
            ChangeKind.CHANGED,
            ChangeKind.CHANGED,
        ]
        await store.remove_replica("replica-1")
        await until(of_all, ChangeKind.ANYTHING)
        assert of_rows.has_pending
    assert (await store.get(OWNER, job.job_id)).snapshot == StoredSnapshot(1, step=3)
