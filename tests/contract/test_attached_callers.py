"""Callers that wait for a job, over all replicas, on both databases: the last that leaves stops it."""

from __future__ import annotations

import asyncio
import random

import pytest

from hidream_grpc.errors import JobNotFoundError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import OWNER, ROOMY, added, claimed, finished, joined, new_job, started

HERE = AttachedCall("call-1", "replica-1")
ELSEWHERE = AttachedCall("call-2", "replica-2")
LEFT = CancelReason.CALLER_LEFT


async def attached(store: SqlJobStore, call: AttachedCall, request_id: str = "r1") -> Job:
    """The job of a request that a caller waits for at a replica that lives."""
    await joined(store, call.replica_id)
    (job,) = await store.add([new_job(request_id=request_id)], ROOMY, call)
    return job


async def test_a_job_that_waits_ends_when_its_last_caller_leaves(store: SqlJobStore) -> None:
    job = await attached(store, HERE)
    cancelled = await store.detach(job.job_id, HERE, LEFT)
    assert cancelled is not None
    assert (cancelled.state, cancelled.cancel_reason) == (JobState.CANCELLED, LEFT)
    assert (await store.get(OWNER, job.job_id)).state is JobState.CANCELLED
    assert await claimed(store) == ()


async def test_a_job_that_runs_is_to_be_stopped_when_its_last_caller_leaves(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    job = await attached(store, HERE)
    (mine,) = await claimed(other, "replica-2")
    await other.save(started(mine))
    cancelled = await store.detach(job.job_id, HERE, CancelReason.DEADLINE)
    assert cancelled is not None
    assert (cancelled.state, cancelled.cancel_reason) == (JobState.RUNNING, CancelReason.DEADLINE)
    (claim,) = await other.held("replica-2")
    assert (claim.job_id, claim.cancel_reason) == (job.job_id, CancelReason.DEADLINE)


async def test_a_caller_at_another_replica_that_lives_keeps_the_job(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    job = await attached(store, HERE)
    assert (await attached(other, ELSEWHERE)).job_id == job.job_id
    assert await store.detach(job.job_id, HERE, LEFT) is None
    kept = await store.get(OWNER, job.job_id)
    assert (kept.state, kept.cancel_reason) == (JobState.QUEUED, None)
    cancelled = await other.detach(job.job_id, ELSEWHERE, LEFT)
    assert cancelled is not None
    assert cancelled.state is JobState.CANCELLED


async def test_a_caller_at_a_replica_that_was_removed_as_dead_does_not_keep_the_job(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    job = await attached(store, HERE)
    await attached(other, ELSEWHERE)
    await store.remove_replica("replica-2")
    cancelled = await store.detach(job.job_id, HERE, LEFT)
    assert cancelled is not None
    assert cancelled.state is JobState.CANCELLED


async def test_a_replica_that_was_taken_for_dead_and_comes_back_still_has_its_callers(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    job = await attached(store, HERE)
    await attached(other, ELSEWHERE)
    await store.remove_replica("replica-2")
    await other.join("replica-3", "{}", before="replica-2")
    assert await store.detach(job.job_id, HERE, LEFT) is None
    cancelled = await other.detach(job.job_id, AttachedCall("call-2", "replica-3"), LEFT)
    assert cancelled is not None


async def test_a_caller_that_leaves_without_a_reason_leaves_the_job_and_counts_no_more(
    store: SqlJobStore,
) -> None:
    job = await attached(store, HERE)
    await attached(store, ELSEWHERE)
    assert await store.detach(job.job_id, HERE, None) is None
    assert (await store.get(OWNER, job.job_id)).state is JobState.QUEUED
    assert await store.detach(job.job_id, ELSEWHERE, LEFT) is not None


async def test_leaving_twice_is_leaving_once(store: SqlJobStore) -> None:
    job = await attached(store, HERE)
    await attached(store, ELSEWHERE)
    for _ in range(2):
        assert await store.detach(job.job_id, HERE, LEFT) is None
    assert (await store.get(OWNER, job.job_id)).state is JobState.QUEUED


async def test_a_job_that_has_ended_stays_as_it_is_when_its_caller_leaves(store: SqlJobStore) -> None:
    job = await attached(store, HERE)
    done = await finished(store, (await claimed(store))[0])
    await store.detach(job.job_id, HERE, LEFT)
    assert await store.get(OWNER, job.job_id) == done
    assert await attached(store, ELSEWHERE) == done


async def test_a_job_with_callers_can_be_deleted_and_is_unknown_to_those_that_leave_it_then(
    store: SqlJobStore,
) -> None:
    job = await attached(store, HERE)
    await finished(store, (await claimed(store))[0])
    await store.delete(OWNER, job.job_id)
    with pytest.raises(JobNotFoundError):
        await store.detach(job.job_id, HERE, LEFT)


async def test_a_job_that_nobody_waits_for_is_not_stopped_by_callers_of_another(store: SqlJobStore) -> None:
    (detached,) = await added(store, new_job())
    job = await attached(store, HERE)
    await store.detach(job.job_id, HERE, LEFT)
    assert (await store.get(OWNER, detached.job_id)).state is JobState.QUEUED


@pytest.mark.parametrize(
    "runs", [pytest.param(False, id="waits", marks=pytest.mark.long), pytest.param(True, id="runs")]
)
async def test_a_retry_that_comes_while_the_caller_before_it_leaves_is_never_lost(
    runs: bool, store: SqlJobStore, other: SqlJobStore, is_long: bool
) -> None:
    generator = random.Random(3)
    for replica_id in ("replica-1", "replica-2"):
        await joined(store, replica_id)

    async def after_a_moment() -> None:
        await asyncio.sleep(generator.uniform(0.0, 0.004))

    for number in range(60 if is_long else 20):
        before = AttachedCall(f"before {number}", "replica-1")
        retry = AttachedCall(f"retry {number}", "replica-2")
        job = await attached(store, before, f"r{number}")
        if runs:
            await claimed(store)

        async def detach(job: Job = job, before: AttachedCall = before) -> None:
            await after_a_moment()
            await store.detach(job.job_id, before, LEFT)

        async def try_again(number: int = number, retry: AttachedCall = retry) -> Job:
            await after_a_moment()
            (accepted,) = await other.add([new_job(request_id=f"r{number}")], ROOMY, retry)
            return accepted

        _, accepted = await asyncio.gather(detach(), try_again())
        kept = await store.get(OWNER, accepted.job_id)
        # One that runs and is to be stopped ends soon, and whoever accepts requests then tries again.
        is_to_be_stopped = runs and accepted.cancel_reason is not None
        assert is_to_be_stopped or (accepted.cancel_reason, kept.cancel_reason) == (None, None), number
        assert not accepted.state.has_ended, number
        assert not kept.state.has_ended, number
        await store.detach(accepted.job_id, retry, LEFT)
        if runs:
            for claim in await store.held("replica-1"):
                held = await store.get(OWNER, claim.job_id)
                await store.save(held.ended(JobState.CANCELLED, store.clock.now()))
