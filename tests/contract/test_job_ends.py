"""How jobs end and are removed, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from hidream_grpc.errors import (
    ClaimLostError,
    DeadlineExceededError,
    JobCancelledError,
    JobNotEndedError,
    JobNotFoundError,
)
from hidream_grpc.jobs.job import CancelReason, JobState
from hidream_grpc.jobs.store.changes import ChangeKind
from hidream_grpc.jobs.store.claims import Saved
from hidream_grpc.jobs.store.records import EndedJob
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import (
    OWNER,
    added,
    claimed,
    finished,
    ids,
    new_job,
    queue_order,
    started,
    succeeded,
    with_image,
)

WROTE = (Saved.WRITTEN, Saved.WAS_WRITTEN)


async def test_a_job_ends_once(store: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    now = time.time()
    endings = [
        ending
        for index in range(5)
        for ending in (
            replace(succeeded(started(job)), end_time=now + index),
            job.ended(JobState.FAILED, now + index, JobCancelledError(job.job_id)),
            started(job),
        )
    ]
    results = await asyncio.gather(*(store.save(ending) for ending in endings), return_exceptions=True)
    kept = await store.get(OWNER, job.job_id)
    ended = [e for e, result in zip(endings, results, strict=True) if result in WROTE and e.state.has_ended]
    (first,) = ended
    assert (kept.state, kept.end_time, kept.images) == (first.state, first.end_time, first.images)
    assert all(isinstance(result, ClaimLostError) for result in results if result not in WROTE)


async def test_an_end_may_be_written_again_when_nobody_knows_whether_it_was(store: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    done = await finished(store, job)
    await store.save(done)
    with pytest.raises(ClaimLostError):
        await store.save(replace(done, end_time=time.time() + 1.0))
    assert await store.get(OWNER, job.job_id) == done


async def test_a_job_that_waits_is_cancelled_at_once(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job())
    cancelled = await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    assert (cancelled.state, cancelled.cancel_reason) == (JobState.CANCELLED, CancelReason.REQUESTED)
    assert isinstance(cancelled.error, JobCancelledError)
    read = await store.get(OWNER, job.job_id)
    assert str(read.error) == str(cancelled.error)
    assert replace(read, error=None) == replace(cancelled, error=None)
    assert await claimed(store) == ()


async def test_a_job_that_runs_is_cancelled_by_its_replica(store: SqlJobStore, other: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    await store.save(started(job))
    asked = await other.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    assert (asked.state, asked.cancel_reason) == (JobState.RUNNING, CancelReason.REQUESTED)
    await store.save(with_image(started(job)))
    assert (await other.get(OWNER, job.job_id)).cancel_reason is CancelReason.REQUESTED, "a save keeps it"
    released = await store.release(started(job))
    assert released.state is JobState.CANCELLED, "it does not wait again"


async def test_cancelling_a_job_that_has_ended_changes_nothing(store: SqlJobStore) -> None:
    await added(store, new_job())
    done = await finished(store, (await claimed(store))[0])
    assert await store.request_cancel(OWNER, done.job_id, CancelReason.REQUESTED) == done


async def test_a_job_that_was_to_be_cancelled_when_its_replica_died_is_never_drawn_again(
    store: SqlJobStore,
) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    await store.remove_replica("replica-1")
    assert await claimed(store, "replica-2") == ()
    assert (await store.get(OWNER, job.job_id)).state is JobState.CANCELLED


async def test_a_job_is_not_started_after_its_deadline(store: SqlJobStore) -> None:
    late, fine = await added(
        store, new_job(deadline_time=time.time() - 1.0), new_job(deadline_time=time.time() + 1000.0)
    )
    assert await store.overdue() == (late.job_id,)
    assert ids(await claimed(store)) == [fine.job_id]
    ended = await store.get(OWNER, late.job_id)
    assert (ended.state, ended.cancel_reason) == (JobState.CANCELLED, CancelReason.DEADLINE)
    assert isinstance(ended.error, DeadlineExceededError)
    assert await store.overdue() == ()


async def test_a_clock_that_the_store_follows_makes_no_job_late_when_it_steps(store: SqlJobStore) -> None:
    deadline_time = store.clock.now() + 1000.0
    (job,) = await added(store, new_job(deadline_time=deadline_time))
    for seconds in (0.0, 7200.0):
        store.clock.follow(store.clock.now() + seconds, store.clock.elapsed_seconds())
    assert store.clock.now() > deadline_time
    assert await store.overdue() == ()
    assert ids(await claimed(store)) == [job.job_id]


async def test_only_a_job_that_has_ended_can_be_deleted(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job(labels={"a": "b"}))
    with pytest.raises(JobNotEndedError):
        await store.delete(OWNER, job.job_id)
    done = await finished(store, (await claimed(store))[0])
    assert await store.delete(OWNER, job.job_id) == done
    with pytest.raises(JobNotFoundError):
        await store.get(OWNER, job.job_id)
    assert (await store.list(OWNER, labels={"a": "b"})).jobs == ()


async def test_retention_sees_what_ended_first_and_how_much_is_kept(store: SqlJobStore) -> None:
    await added(store, *(new_job() for _ in range(3)))
    first, second, running = await claimed(store, limit=3)
    await finished(store, second, size_bytes=3_000_000_000)
    await finished(store, first, size_bytes=500)
    await store.save(with_image(started(running)))
    oldest, newest = await store.ended()
    assert (oldest.job_id, oldest.image_bytes) == (second.job_id, 3_000_000_000)
    assert oldest.end_time <= newest.end_time
    assert newest.job_id == first.job_id
    assert await store.ended(limit=1) == (oldest,)
    assert await store.ended(oldest) == (newest,)
    assert await store.ended(newest) == ()
    usage = await store.usage()
    assert (usage.num_ended_jobs, usage.image_bytes) == (2, 3_000_000_500)


async def test_what_has_ended_is_read_once_page_by_page_also_of_one_moment(store: SqlJobStore) -> None:
    jobs = await added(store, *(new_job() for _ in range(7)))
    now = time.time()
    for index, job in enumerate(await claimed(store, limit=7)):
        await store.save(replace(succeeded(started(job)), end_time=now + index // 3))
    read: list[EndedJob] = []
    while more := await store.ended(read[-1] if read else None, limit=2):
        read += more
    assert [ended.job_id for ended in read] == ids(jobs)


async def test_retention_removes_what_has_ended_and_nothing_else(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    await added(store, *(new_job(labels={"a": "b"}) for _ in range(4)))
    *ended, running = await claimed(store, limit=3)
    for job in ended:
        await finished(store, job)
    with other.subscribe() as changes:
        everything = ids((await store.list(OWNER)).jobs)
        await store.delete_ended([*everything, "deleted meanwhile"])
        await store.publish([("the end", b"")])
        told: list[str] = []
        async with asyncio.timeout(20.0):
            async for change in changes:
                if change.kind is ChangeKind.PUBLISHED:
                    break
                if change.kind is ChangeKind.DELETED:
                    told.append(change.job_id)
    assert sorted(told) == sorted(ids(ended)), "those that are there are not told to be gone"
    kept = (await store.list(OWNER, labels={"a": "b"})).jobs
    assert [job.state for job in kept] == [JobState.QUEUED, JobState.QUEUED]
    assert running.job_id in ids(kept)
    await store.save(started(running))
    assert (await store.usage()).num_ended_jobs == 0


async def test_a_caller_whose_jobs_are_all_deleted_is_new_again(store: SqlJobStore) -> None:
    done = {}
    # The newest turn is kept: turns are counted on from it.
    for caller in ("a", "b", "newest"):
        await added(store, new_job(caller=caller))
        done[caller] = await finished(store, (await claimed(store))[0])
    await store.delete(OWNER, done["b"].job_id)
    a, b = await added(store, new_job(caller="a"), new_job(caller="b"))
    assert await queue_order(store) == [b.job_id, a.job_id]


async def test_an_end_that_was_written_and_whose_answer_was_lost_is_counted(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    done = succeeded(with_image(started(job)))
    # As the first try of this server would have written it.
    assert await other.save(done) is Saved.WRITTEN
    num_ended = store.num_ended(JobState.SUCCEEDED)
    assert await store.save(done) is Saved.WAS_WRITTEN
    assert store.num_ended(JobState.SUCCEEDED) == num_ended + 1


async def test_a_job_that_is_to_be_cancelled_ends_in_no_other_way(store: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    done = succeeded(with_image(started(job)))
    assert await store.save(done) is Saved.IS_TO_BE_CANCELLED
    assert (await store.get(OWNER, job.job_id)).state is JobState.QUEUED, "nothing was written"
    cancelled = job.ended(JobState.CANCELLED, time.time(), JobCancelledError(job.job_id))
    assert await store.save(replace(cancelled, cancel_reason=CancelReason.REQUESTED)) is Saved.WRITTEN
