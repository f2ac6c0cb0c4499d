"""What is accepted, on SQLite and on PostgreSQL alike: all of a call, or none; a request once."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from hidream_grpc.errors import (
    CallerQueueFullError,
    FieldViolation,
    InvalidRequestError,
    JobCancelledError,
    QueueFullError,
    RequestIdConflictError,
)
from hidream_grpc.jobs.job import CancelReason, JobState
from hidream_grpc.jobs.store import sqlite
from hidream_grpc.jobs.store.records import QueueLimits
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import (
    OWNER,
    ROOMY,
    StoreDatabase,
    added,
    claimed,
    finished,
    ids,
    new_job,
)


async def test_a_job_is_read_as_it_was_added(store: SqlJobStore) -> None:
    job = new_job(prompt="NUL \0, 猫, 🐈", labels={"NUL \0": "ä\n"}, deadline_time=1.5e9 + 0.123456)
    assert await added(store, job) == (job,)
    assert await store.get(OWNER, job.job_id) == job


async def test_the_same_request_gives_the_same_job(store: SqlJobStore, other: SqlJobStore) -> None:
    (first,) = await added(store, new_job(request_id="r1"))
    (again,) = await added(other, new_job(request_id="r1", caller="another host"))
    assert again == first
    assert (await store.counts()).total() == 1


async def test_the_same_request_at_the_same_time_gives_one_job(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    answers = await asyncio.gather(
        *(added(replica, new_job(request_id="r1")) for replica in [store, other] * 8)
    )
    assert len({job.job_id for (job,) in answers}) == 1
    assert (await store.counts()).total() == 1


async def test_batches_that_name_the_same_requests_at_the_same_time_give_the_same_jobs(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    names = ["r1", "r2", "r3", "r4"]
    orders = [names, names[::-1], names[2:] + names[:2], names[1:]] * 4
    answers = await asyncio.gather(
        *(
            added(replica, *(new_job(request_id=name) for name in order))
            for replica, order in zip([store, other] * 8, orders, strict=True)
        )
    )
    found = {(job.submission.request_id, job.job_id) for jobs in answers for job in jobs}
    assert sorted(name for name, _ in found) == names
    assert [[job.submission.request_id for job in jobs] for jobs in answers] == orders
    assert (await store.counts()).total() == len(names)


async def test_a_request_id_of_another_request_is_refused(store: SqlJobStore) -> None:
    (first,) = await added(store, new_job(request_id="r1"))
    with pytest.raises(RequestIdConflictError) as caught:
        await added(store, new_job(), new_job(request_id="r1", prompt="something else"))
    assert (caught.value.request_id, caught.value.job_id) == ("r1", first.job_id)
    assert (await store.counts()).total() == 1, "the other job of the batch was not accepted either"


async def test_a_batch_may_name_a_request_twice_but_not_two_requests_alike(store: SqlJobStore) -> None:
    twice = await added(store, new_job(request_id="r1"), new_job(request_id="r1"))
    assert twice[0] == twice[1]
    with pytest.raises(RequestIdConflictError):
        await added(store, new_job(request_id="r2"), new_job(request_id="r2", prompt="something else"))


async def test_a_request_that_is_refused_finds_the_job_that_it_became_and_nothing_else(
    store: SqlJobStore,
) -> None:
    refusal = InvalidRequestError((FieldViolation("spec.width", "too wide"),))
    (first,) = await added(store, new_job(request_id="r1"))
    assert await store.add([new_job(request_id="r1")], ROOMY, refusal=refusal) == (first,)
    for jobs in (
        [new_job(request_id="r2")],
        [new_job(request_id="r1", prompt="something else")],
        [new_job(request_id="r1"), new_job(request_id="r2")],
    ):
        with pytest.raises(InvalidRequestError):
            await store.add(jobs, ROOMY, refusal=refusal)
    await store.request_cancel(OWNER, first.job_id, CancelReason.REQUESTED)
    with pytest.raises(InvalidRequestError):
        await store.add([new_job(request_id="r1")], ROOMY, refusal=refusal)
    assert ids((await store.list(OWNER)).jobs) == [first.job_id]


async def test_owners_do_not_share_request_ids(store: SqlJobStore) -> None:
    (hers,) = await added(store, new_job(request_id="r1"))
    (his,) = await added(store, new_job(request_id="r1", owner="bert", prompt="something else"))
    assert hers.job_id != his.job_id


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
async def test_a_request_id_is_free_again_when_its_job_came_to_nothing(
    store: SqlJobStore, state: JobState
) -> None:
    await added(store, new_job(request_id="r1"))
    (job,) = await claimed(store)
    await store.save(job.ended(state, time.time(), JobCancelledError(job.job_id)))
    (retry,) = await added(store, new_job(request_id="r1", prompt="something else"))
    assert retry.job_id != job.job_id
    assert (await added(store, new_job(request_id="r1", prompt="something else"))) == (retry,)


async def test_a_job_that_succeeded_keeps_its_request_id_until_it_is_deleted(store: SqlJobStore) -> None:
    await added(store, new_job(request_id="r1"))
    (job,) = await claimed(store)
    done = await finished(store, job)
    assert await added(store, new_job(request_id="r1")) == (done,)
    await store.delete(OWNER, job.job_id)
    (retry,) = await added(store, new_job(request_id="r1"))
    assert retry.job_id != job.job_id


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [(100.0, 200.0, 200.0), (200.0, 100.0, 200.0), (100.0, None, None), (None, 9.0, None)],
)
async def test_of_several_callers_of_a_request_the_latest_deadline_counts(
    store: SqlJobStore, first: float | None, second: float | None, kept: float | None
) -> None:
    await added(store, new_job(request_id="r1", deadline_time=first))
    (job,) = await added(store, new_job(request_id="r1", deadline_time=second))
    assert job.deadline_time == kept
    assert await store.get(OWNER, job.job_id) == job


async def test_a_batch_that_does_not_fit_the_queue_is_refused_as_a_whole(store: SqlJobStore) -> None:
    limits = QueueLimits(max_queued_jobs=3, retry_after_seconds=2.5)
    await store.add([new_job(), new_job()], limits)
    with pytest.raises(QueueFullError) as caught:
        await store.add([new_job(), new_job()], limits)
    assert (caught.value.max_queued_jobs, caught.value.retry_after_seconds) == (3, 2.5)
    assert (await store.counts())[JobState.QUEUED] == 2
    await claimed(store)
    assert len(await store.add([new_job(), new_job()], limits)) == 2


async def test_a_full_queue_still_answers_for_what_it_holds(store: SqlJobStore) -> None:
    limits = QueueLimits(max_queued_jobs=1)
    (job,) = await store.add([new_job(request_id="r1")], limits)
    assert await store.add([new_job(request_id="r1")], limits) == (job,)


async def test_replicas_together_never_accept_more_than_the_queue_holds(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    limits = QueueLimits(max_queued_jobs=5)
    answers = await asyncio.gather(
        *(replica.add([new_job()], limits) for replica in [store, other] * 8), return_exceptions=True
    )
    assert sum(isinstance(answer, tuple) for answer in answers) == 5
    assert sum(isinstance(answer, QueueFullError) for answer in answers) == 11


async def test_a_caller_that_uses_up_its_share_leaves_the_others_theirs(store: SqlJobStore) -> None:
    limits = QueueLimits(max_queued_jobs=100, max_queued_jobs_of_caller=2)
    await store.add([new_job(), new_job()], limits)
    with pytest.raises(CallerQueueFullError):
        await store.add([new_job()], limits)
    await store.add([new_job(caller="host-2")], limits)


async def test_callers_that_go_away_meanwhile_leave_whole_batches_and_a_free_store(
    database: StoreDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A transaction that is left in the middle would have the others wait, and then fail.
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_SECONDS", 0.2)
    generator = random.Random(6)
    accepted = Counter[int]()
    add_seconds = 0.0
    async with database.opened() as store:
        for _ in range(50):
            batch = [new_job(caller="gone", labels={"batch": "x"}) for _ in range(3)]
            task = asyncio.create_task(added(store, *batch))
            # At any moment of what it took the last time, on however busy a machine.
            await asyncio.sleep(generator.uniform(0.0, 2.0 * add_seconds))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            reading = asyncio.create_task(store.list(OWNER))
            await asyncio.sleep(generator.uniform(0.0, 0.002))
            reading.cancel()
            accepted[len(await store.get_all(ids(batch)))] += 1
            begin_seconds = time.monotonic()
            await added(store, new_job())
            add_seconds = time.monotonic() - begin_seconds
    assert accepted.keys() == {0, 3}


async def test_nothing_is_added_for_nothing(store: SqlJobStore) -> None:
    assert await store.add((), ROOMY) == ()
