"""Which replica draws which job, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine

from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import (
    ClaimLostError,
)
from hidream_grpc.jobs.job import (
    CancelReason,
    Job,
    JobState,
    ModelIdentity,
    Progress,
    StoredSnapshot,
    claim_sequence,
)
from hidream_grpc.jobs.store.order import TURNS_PER_OLDEST, CallerLoads, WaitingJob, claim_order
from hidream_grpc.jobs.store.records import HeldClaim
from hidream_grpc.jobs.store.step_room import StepDemand, StepRoom
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.model.parameters import SampleSize
from tests.support.job_stores import (
    MODEL,
    OWNER,
    StoreDatabase,
    added,
    claimed,
    finished,
    ids,
    joined,
    new_job,
    queue_order,
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


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
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
    told = await queue_order(store)
    assert told == ids(await claimed(store, limit=len(told)))
    assert await queue_order(store) == []


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(list(Priority))), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 2 * TURNS_PER_OLDEST)),
)
def test_no_caller_gets_a_second_turn_before_another_that_waits_has_had_one(
    waiting: list[tuple[str, Priority]], last_turns: dict[str, int]
) -> None:
    jobs = {
        str(number): WaitingJob(number, str(number), caller, priority)
        for number, (caller, priority) in enumerate(waiting)
    }
    turns = claim_order(jobs.values(), CallerLoads(last_turns))
    order = list(turns)
    assert sorted(job.acceptance_number for job in order) == list(range(len(waiting)))
    in_turn = [job for job in order if job.job_id not in turns.due]
    assert [job.priority for job in in_turn] == sorted((job.priority for job in in_turn), reverse=True)
    for place, (earlier, later) in enumerate(itertools.pairwise(order), start=1):
        rest = order[place:]
        if earlier.job_id in turns.due:
            assert earlier.acceptance_number < min(job.acceptance_number for job in rest)
        elif later.job_id not in turns.due and (earlier.priority, earlier.caller) == (
            later.priority,
            later.caller,
        ):
            assert {job.caller for job in rest if job.priority == later.priority} == {later.caller}


async def test_every_seventeenth_claim_is_of_the_oldest_job_at_whatever_replica(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    low, *_ = await added(
        store, new_job(priority=Priority.LOW), *(new_job(caller=caller) for caller in 10 * "ab")
    )
    told = await queue_order(other)
    claims: list[str] = []
    for replica in itertools.islice(itertools.cycle([store, other]), TURNS_PER_OLDEST):
        claims += ids(await claimed(replica))
    assert claims == told[:TURNS_PER_OLDEST]
    assert claims[-1] == low.job_id


async def test_as_many_jobs_are_claimed_as_there_is_room_for_and_one_that_is_due_beside_them(
    store: SqlJobStore,
) -> None:
    def full_of_high() -> StepRoom:
        return full_of(Priority.HIGH, max_running_jobs=2)

    low, *_ = await added(store, new_job(priority=Priority.LOW), *(new_job() for _ in range(18)))
    await joined(store, "replica-1")
    assert await store.claim("replica-1", MODEL, 9, room=full_of_high) == ()
    assert len(await claimed(store, limit=TURNS_PER_OLDEST - 1)) == TURNS_PER_OLDEST - 1
    assert ids(await store.claim("replica-1", MODEL, 9, room=full_of_high)) == [low.job_id]
    assert await store.claim("replica-1", MODEL, 9, room=full_of_high) == ()


def full_of(priority: Priority, max_running_jobs: int) -> StepRoom:
    """One job runs, which fills a step."""
    return StepRoom([StepDemand("z", priority, SampleSize(64, 64), 2**40, 9)], max_running_jobs, 2**40)


async def test_a_job_that_is_due_keeps_its_turn_until_fewer_run_than_may(store: SqlJobStore) -> None:
    low, *_ = await added(store, new_job(priority=Priority.LOW), *(new_job() for _ in range(18)))
    await claimed(store, limit=TURNS_PER_OLDEST - 1)
    for _ in range(3):
        (high,) = await added(store, new_job(priority=Priority.HIGH))
        room = partial(full_of, Priority.NORMAL, max_running_jobs=1)
        assert ids(await store.claim("replica-1", MODEL, 9, room=room)) == [high.job_id]
    room = partial(full_of, Priority.NORMAL, max_running_jobs=2)
    assert ids(await store.claim("replica-1", MODEL, 1, room=room)) == [low.job_id]


class RoomForNormal(StepRoom):
    """There is room for jobs of normal priority, and for what is due."""

    def take(self, demand: StepDemand, is_due: bool = False) -> bool:
        return is_due or demand.priority is Priority.NORMAL


async def test_jobs_that_start_past_another_leave_the_oldest_its_turn(store: SqlJobStore) -> None:
    low, *_ = await added(store, new_job(priority=Priority.LOW), *(new_job() for _ in range(14)))
    await claimed(store, limit=TURNS_PER_OLDEST - 3)
    await added(store, new_job(priority=Priority.HIGH))
    normal = await added(store, *(new_job(caller=caller) for caller in "abcde"))
    started: list[str] = []
    while jobs := await store.claim("replica-1", MODEL, 9, room=lambda: RoomForNormal((), 16, 1)):
        started += ids(jobs)
    assert started == [*ids(normal[:2]), low.job_id, *ids(normal[2:])]


async def test_starts_of_another_model_overtake_none(store: SqlJobStore) -> None:
    def of_another(job: Job) -> Job:
        model = ModelIdentity("HiDream-I1-Dev", "dev", "fedcba9876543210")
        return replace(job, submission=replace(job.submission, model=model))

    await added(store, new_job(priority=Priority.LOW))
    await added(store, of_another(new_job()))
    await joined(store, "replica-2")
    assert len(await store.claim("replica-2", "fedcba9876543210", 1)) == 1
    assert (await store.caller_loads(MODEL)).newest_start == 0
    assert (await store.caller_loads("fedcba9876543210")).newest_start > 0


async def test_turns_are_counted_on_when_the_jobs_of_the_latest_one_are_removed(store: SqlJobStore) -> None:
    low, _ = await added(store, new_job(caller="a", priority=Priority.LOW), new_job(caller="b"))
    (running,) = await claimed(store)
    assert running.submission.caller == "b"
    for turn in range(2, TURNS_PER_OLDEST + 1):
        await added(store, new_job(caller="c"))
        (job,) = await claimed(store)
        assert (job.job_id == low.job_id) == (turn == TURNS_PER_OLDEST)
        await finished(store, job)
        await store.delete(OWNER, job.job_id)


async def test_a_caller_at_its_limit_of_running_jobs_is_passed_over(store: SqlJobStore) -> None:
    jobs = await added(store, new_job(caller="a"), new_job(caller="a"), new_job(caller="b"))
    first = await claimed(store, limit=10, max_running_jobs_of_caller=1)
    assert ids(first) == [jobs[0].job_id, jobs[2].job_id]
    await finished(store, first[0])
    assert ids(await claimed(store, limit=10, max_running_jobs_of_caller=1)) == [jobs[1].job_id]


async def test_the_order_that_is_told_keeps_to_the_limit_of_a_caller(store: SqlJobStore) -> None:
    jobs = await added(store, *(new_job(caller="a") for _ in range(3)), new_job(caller="b"))
    told = await queue_order(store, max_running_jobs_of_caller=1)
    assert told == [jobs[index].job_id for index in (0, 3, 1, 2)]
    await claimed(store, max_running_jobs_of_caller=1)
    assert (await queue_order(store, 1))[0] == jobs[3].job_id


async def test_limits_and_turns_of_callers_hold_when_replicas_claim_at_once(
    store: SqlJobStore, other: SqlJobStore, is_long: bool
) -> None:
    for replica_id in ("replica-1", "replica-2"):
        await joined(store, replica_id)
    for _ in range(20 if is_long else 8):
        jobs = await added(store, *(new_job(caller=caller) for caller in "aaabbb"))
        both = await asyncio.gather(
            store.claim("replica-1", MODEL, 1, 1), other.claim("replica-2", MODEL, 1, 1)
        )
        taken = [job for claims in both for job in claims]
        assert sorted(job.submission.caller for job in taken) == ["a", "b"]
        for job in taken:
            await finished(store, job)
        for job in jobs:
            await store.request_cancel(None, job.job_id, CancelReason.REQUESTED)


async def test_a_server_claims_the_jobs_of_its_own_model_only(store: SqlJobStore) -> None:
    def of_model(fingerprint: str) -> Job:
        job = new_job()
        model = ModelIdentity("HiDream-I1-Dev", "dev", fingerprint)
        return replace(job, submission=replace(job.submission, model=model))

    (mine,) = await added(store, of_model(MODEL))
    (others,) = await added(store, of_model("fedcba9876543210"))
    assert await queue_order(store) == [mine.job_id]
    assert ids(await claimed(store, limit=5)) == [mine.job_id]
    await joined(store, "replica-2")
    (taken,) = await store.claim("replica-2", "fedcba9876543210", 5)
    assert (taken.job_id, taken.submission.model) == (others.job_id, others.submission.model)


async def test_what_its_replica_saved_is_read_by_all(store: SqlJobStore, other: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    job = with_image(with_image(started(job))).progressed(Progress(3, 4, 0.1, None), 0.3)
    job = replace(job, snapshot=StoredSnapshot(job.claim_number, 3))
    await store.save(job)
    assert await other.get(OWNER, job.job_id) == job
    done = succeeded(job)
    await store.save(done)
    assert await other.get(OWNER, job.job_id) == done


async def test_a_job_whose_replica_is_removed_as_dead_goes_on_elsewhere_with_all_that_was_saved(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    job = replace(with_image(started(job)), snapshot=StoredSnapshot(job.claim_number, 2))
    await store.save(job)
    assert await claimed(other, "replica-2") == (), "its replica lives"
    assert await other.remove_replica("replica-1", 0)
    (taken,) = await claimed(other, "replica-2")
    assert taken == replace(job, claim_number=job.claim_number + 1)
    with pytest.raises(ClaimLostError) as caught:
        await store.save(with_image(job))
    assert (caught.value.job_id, caught.value.claim_number) == (job.job_id, job.claim_number)
    await finished(other, taken)


async def test_a_job_that_was_begun_and_lost_its_replica_goes_before_all_others(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job(priority=Priority.LOW))
    (mine,) = await claimed(store)
    await store.save(started(mine))
    await added(store, new_job(priority=Priority.HIGH))
    await store.remove_replica("replica-1")
    assert ids(await claimed(store, "replica-2")) == [job.job_id]


async def test_a_replica_that_beats_is_not_removed_as_dead(store: SqlJobStore, other: SqlJobStore) -> None:
    await added(store, new_job())
    await claimed(store)
    (seen,) = await other.replicas()
    assert seen.heartbeat < (await store.beat("replica-1"))[0].heartbeat
    assert not await other.remove_replica("replica-1", seen.heartbeat)
    assert await claimed(other, "replica-2") == ()


async def test_a_replica_learns_from_its_beat_that_it_was_removed(
    store: SqlJobStore, other: SqlJobStore
) -> None:
    await joined(store, "replica-1")
    await joined(other, "replica-2")
    await other.remove_replica("replica-1")
    assert [record.replica_id for record in await store.beat("replica-1")] == ["replica-2"]


async def test_a_replica_learns_what_it_holds_and_what_is_to_be_stopped(store: SqlJobStore) -> None:
    jobs = await added(store, new_job(), new_job())
    await claimed(store, limit=2)
    await store.request_cancel(OWNER, jobs[1].job_id, CancelReason.CALLER_LEFT)
    held = sorted(await store.held("replica-1"), key=lambda claim: ids(jobs).index(claim.job_id))
    assert held == [
        HeldClaim(jobs[0].job_id, 1, None),
        HeldClaim(jobs[1].job_id, 1, CancelReason.CALLER_LEFT),
    ]


async def test_a_claim_whose_answer_was_lost_is_given_back(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job())
    await claimed(store)
    (claim,) = await store.held("replica-1")
    await store.abandon("replica-1", claim)
    (again,) = await claimed(store, "replica-2")
    assert (again.job_id, again.claim_number) == (job.job_id, 2)
    await store.abandon("replica-1", claim)
    assert await claimed(store, "replica-3") == ()


async def test_a_released_job_waits_again_with_its_images_and_its_snapshot(store: SqlJobStore) -> None:
    await added(store, new_job())
    (job,) = await claimed(store)
    job = replace(with_image(started(job)), snapshot=StoredSnapshot(job.claim_number, 3))
    released = await store.release(job)
    assert (released.state, released.snapshot) == (JobState.QUEUED, job.snapshot)
    assert released.images == job.images
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


async def test_a_reason_to_cancel_that_only_a_newer_version_knows_stops_no_server(
    store: SqlJobStore, database: StoreDatabase
) -> None:
    await added(store, new_job())
    await claimed(store)
    engine = create_async_engine(database.url)
    async with engine.begin() as connection:
        await connection.exec_driver_sql("UPDATE jobs SET cancel_reason = 'BORED', state = 'PAUSED'")
    await engine.dispose()
    (claim,) = await store.held("replica-1")
    assert claim.cancel_reason is CancelReason.REQUESTED
    assert (await store.counts()).total() == 0


async def test_a_replica_may_join_again_when_the_answer_was_lost(store: SqlJobStore) -> None:
    for _ in range(2):
        await store.join("replica-1", "{}")
    assert [record.replica_id for record in await store.replicas()] == ["replica-1"]
