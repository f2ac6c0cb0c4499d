"""Which replica draws which job, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import (
    ClaimLostError,
)
from hidream_grpc.jobs.job import CancelReason, Job, JobState, Priority, Progress, claim_sequence
from hidream_grpc.jobs.store.order import WaitingJob, claim_order
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.job_stores import (
    LEASE_SECONDS,
    OWNER,
    added,
    claimed,
    eventually,
    finished,
    ids,
    new_job,
    started,
    succeeded,
    with_image,
)


async def test_replicas_never_claim_the_same_job(store: SqlJobStore, other: SqlJobStore) -> None:
    jobs = await added(store, *(new_job(caller=f"host-{index % 5}") for index in range(60)))

    async def claim_all(replica: SqlJobStore, replica_id: str) -> list[str]:
        mine: list[str] = []
        while more := await claimed(replica, replica_id, limit=3):
            mine += ids(more)
        return mine

    claims = await asyncio.gather(
        *(claim_all([store, other][index % 2], f"replica-{index}") for index in range(8))
    )
    everything = [job_id for claim in claims for job_id in claim]
    assert sorted(everything) == sorted(ids(jobs))


async def test_jobs_are_claimed_by_priority_then_in_turns_then_by_age(store: SqlJobStore) -> None:
    names = {
        job.job_id: name
        for name, job in zip(
            ("a1", "a2", "a3", "b1", "a low", "b high"),
            await added(
                store,
                new_job(caller="a"),
                new_job(caller="a"),
                new_job(caller="a"),
                new_job(caller="b"),
                new_job(caller="a", priority=Priority.LOW),
                new_job(caller="b", priority=Priority.HIGH),
            ),
            strict=True,
        )
    }
    order = [names[job_id] for job_id in ids(await claimed(store, limit=10))]
    assert order == ["b high", "a1", "b1", "a2", "a3", "a low"]


@pytest.mark.parametrize("seed", range(3))
async def test_the_order_that_is_told_is_the_order_of_the_claims(store: SqlJobStore, seed: int) -> None:
    generator = random.Random(seed)

    def some_jobs() -> list[Job]:
        return [
            new_job(caller=generator.choice("abcd"), priority=generator.choice(list(Priority)))
            for _ in range(12)
        ]

    await added(store, *some_jobs())
    await claimed(store, limit=5)
    await added(store, *some_jobs())
    told = await store.queue_order()
    assert list(told) == ids(await claimed(store, limit=len(told)))
    assert await store.queue_order() == ()


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(Priority))), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 9)),
)
def test_no_caller_gets_a_second_turn_before_another_that_waits_has_had_one(
    waiting: list[tuple[str, Priority]], last_turns: dict[str, int]
) -> None:
    jobs = {
        str(number): WaitingJob(number, str(number), caller, priority)
        for number, (caller, priority) in enumerate(waiting)
    }
    order = [jobs[job_id] for job_id in claim_order(jobs.values(), last_turns)]
    assert sorted(job.number for job in order) == list(range(len(waiting)))
    assert [job.priority for job in order] == sorted((job.priority for job in order), reverse=True)
    for earlier, later in itertools.pairwise(order):
        if earlier.priority == later.priority and earlier.caller == later.caller:
            rest = order[order.index(later) :]
            assert {job.caller for job in rest if job.priority == later.priority} == {later.caller}


async def test_a_caller_at_its_limit_of_running_jobs_is_passed_over(store: SqlJobStore) -> None:
    jobs = await added(store, new_job(caller="a"), new_job(caller="a"), new_job(caller="b"))
    first = await store.claim("replica-1", LEASE_SECONDS, 10, max_running_jobs_of_caller=1)
    assert ids(first) == [jobs[0].job_id, jobs[2].job_id]
    await finished(store, first[0])
    assert ids(await store.claim("replica-1", LEASE_SECONDS, 10, 1)) == [jobs[1].job_id]


async def test_what_its_replica_saved_is_read_by_all(store: SqlJobStore, other: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    job = with_image(with_image(started(job))).progressed(Progress(3, 4, 0.1, None), 0.3)
    job = replace(job, snapshot_step=3)
    await store.save(job)
    assert await other.get(OWNER, job.job_id) == job
    done = succeeded(job)
    await store.save(done)
    assert await other.get(OWNER, job.job_id) == done


async def test_a_job_whose_lease_ran_out_goes_on_elsewhere_with_all_that_was_saved(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    await added(store, new_job())
    (job,) = await store.claim("replica-1", 0.5, 1)
    job = replace(with_image(started(job)), snapshot_step=2)
    await store.save(job)
    assert await claimed(other, "replica-2") == (), "the lease runs"
    (taken,) = await eventually(lambda: claimed(other, "replica-2"))
    assert taken == replace(job, claim_number=job.claim_number + 1)
    with pytest.raises(ClaimLostError) as caught:
        await store.save(with_image(job))
    assert (caught.value.job_id, caught.value.claim_number) == (job.job_id, job.claim_number)
    await finished(other, taken)


async def test_a_job_that_was_begun_and_lost_its_replica_goes_before_all_others(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job(priority=Priority.LOW))
    (mine,) = await store.claim("replica-1", 0.0, 1)
    await store.save(started(mine))
    await added(store, new_job(priority=Priority.HIGH))
    assert ids(await claimed(store, "replica-2")) == [job.job_id]


async def test_a_replica_that_renews_keeps_its_jobs(store: SqlJobStore, other: SqlJobStore) -> None:
    jobs = await added(store, new_job(), new_job())
    mine = await claimed(store, "replica-1", limit=2)
    assert ids(mine) == ids(jobs)
    await store.renew("replica-1", ids(jobs), 0.0)
    (held,) = await store.renew("replica-1", [jobs[0].job_id], LEASE_SECONDS)
    assert (held.job_id, held.claim_number) == (jobs[0].job_id, mine[0].claim_number)
    assert ids(await claimed(other, "replica-2", limit=5)) == [jobs[1].job_id]


async def test_a_replica_learns_from_its_renewal_what_it_has_lost(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    jobs = await added(store, new_job(), new_job(), new_job())
    await claimed(store, "replica-1", limit=2)
    await store.renew("replica-1", ids(jobs), 0.0)
    await claimed(other, "replica-2", limit=1)
    held = await store.renew("replica-1", ids(jobs), LEASE_SECONDS)
    assert [claim.job_id for claim in held] == [jobs[1].job_id]


async def test_a_renewal_tells_who_wants_the_job_stopped_and_its_deadline(
    store: SqlJobStore,
) -> None:
    deadline_time = time.time() + 1000.0
    (job,) = await added(store, new_job(request_id="r1", deadline_time=deadline_time))
    await claimed(store)
    await added(store, new_job(request_id="r1", deadline_time=deadline_time + 1.0))
    await store.request_cancel(OWNER, job.job_id, CancelReason.CALLER_LEFT)
    (held,) = await store.renew("replica-1", [job.job_id], LEASE_SECONDS)
    assert (held.cancel_reason, held.deadline_time) == (CancelReason.CALLER_LEFT, deadline_time + 1.0)


async def test_a_released_job_waits_again_with_its_images_and_its_snapshot(store: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    job = replace(with_image(started(job)), snapshot_step=3)
    released = await store.release(job)
    assert (released.state, released.snapshot_step, released.images) == (JobState.QUEUED, 3, job.images)
    assert await store.get(OWNER, job.job_id) == released
    with pytest.raises(ClaimLostError):
        await store.save(job)
    (again,) = await claimed(store, "replica-2")
    assert again == replace(released, claim_number=job.claim_number + 1)


async def test_sequences_grow_from_claim_to_claim(store: SqlJobStore) -> None:
    await added(store, new_job())
    sequences: list[int] = []
    for _ in range(3):
        (job,) = await claimed(store)
        job = with_image(started(job))
        sequences += [job.started_sequence, job.images[-1].first_sequence, job.last_sequence]
        await store.release(job)
    cancelled = await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    sequences.append(cancelled.last_sequence)
    assert sequences == sorted(sequences)
    assert cancelled.last_sequence == claim_sequence(4, 1)
