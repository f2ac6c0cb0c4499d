"""What a service relies on in the job store, on SQLite and on PostgreSQL alike."""

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
    CallerQueueFullError,
    ClaimLostError,
    DeadlineExceededError,
    InvalidRequestError,
    JobCancelledError,
    JobNotEndedError,
    JobNotFoundError,
    QueueFullError,
    RequestIdConflictError,
)
from hidream_grpc.jobs.job import CancelReason, Job, JobState, Priority, Progress, claim_sequence
from hidream_grpc.jobs.store.order import WaitingJob, claim_order
from hidream_grpc.jobs.store.page_token import decode_page_token, filter_digest_of
from hidream_grpc.jobs.store.records import QueueLimits
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.job_stores import (
    LEASE_SECONDS,
    OWNER,
    ROOMY,
    added,
    claimed,
    eventually,
    finished,
    new_job,
    started,
    succeeded,
    with_image,
)


def ids(jobs: tuple[Job, ...]) -> list[str]:
    return [job.job_id for job in jobs]


# --- accepting ----------------------------------------------------------------------------------------


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


async def test_callers_that_go_away_meanwhile_leave_whole_batches_only(
    store: SqlJobStore,
) -> None:
    generator = random.Random(6)
    for _ in range(20):
        batch = [new_job(caller="gone", labels={"batch": "x"}) for _ in range(3)]
        task = asyncio.create_task(added(store, *batch))
        for _ in range(generator.randrange(30)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(await store.known([job.job_id for job in batch])) in (0, 3)
    assert len(await added(store, new_job())) == 1


# --- reading ------------------------------------------------------------------------------------------


async def test_nobody_sees_the_job_of_another(store: SqlJobStore) -> None:
    (job,) = await added(store, new_job())
    for attempt in (
        store.get("bert", job.job_id),
        store.request_cancel("bert", job.job_id, CancelReason.REQUESTED),
        store.delete("bert", job.job_id),
        store.get(OWNER, "no such job"),
    ):
        with pytest.raises(JobNotFoundError):
            await attempt
    assert (await store.list("bert")).jobs == ()
    assert await store.get(None, job.job_id) == job


async def test_pages_show_every_job_once_newest_first_while_jobs_come_and_go(store: SqlJobStore) -> None:
    jobs = await added(store, *(new_job() for _ in range(10)))
    seen: list[str] = []
    page = await store.list(OWNER, page_size=3)
    seen += ids(page.jobs)
    await added(store, new_job())
    for index in (7, 5):  # the last one that was shown, and one that was not yet
        await store.request_cancel(OWNER, jobs[index].job_id, CancelReason.REQUESTED)
        await store.delete(OWNER, jobs[index].job_id)
    while page.next_page_token:
        page = await store.list(OWNER, page_size=3, page_token=page.next_page_token)
        seen += ids(page.jobs)
    assert seen == [jobs[index].job_id for index in (9, 8, 7, 6, 4, 3, 2, 1, 0)]


async def test_the_last_page_has_no_token_even_when_it_is_full(store: SqlJobStore) -> None:
    await added(store, *(new_job() for _ in range(4)))
    first = await store.list(OWNER, page_size=2)
    last = await store.list(OWNER, page_size=2, page_token=first.next_page_token)
    assert (len(last.jobs), last.next_page_token) == (2, "")


async def test_a_page_token_of_another_filter_is_refused(store: SqlJobStore) -> None:
    await added(store, *(new_job() for _ in range(3)))
    token = (await store.list(OWNER, page_size=1)).next_page_token
    with pytest.raises(InvalidRequestError) as caught:
        await store.list(OWNER, states=[JobState.QUEUED], page_size=1, page_token=token)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


@given(token=st.text(min_size=1) | st.binary(min_size=1).map(lambda data: data.hex()))
def test_whatever_is_sent_as_a_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidRequestError):
        decode_page_token(token, filter_digest_of(OWNER, frozenset(), {}))


async def test_jobs_are_found_by_state_and_by_all_of_their_labels(store: SqlJobStore) -> None:
    a, b, c = await added(
        store,
        new_job(labels={"team": "x", "run": "1"}),
        new_job(labels={"team": "x", "run": "2"}),
        new_job(labels={"team": "y", "run": "1"}),
    )
    (running,) = await claimed(store)
    await store.save(started(running))

    async def found(states: tuple[JobState, ...] = (), **labels: str) -> list[str]:
        return ids((await store.list(OWNER, states, labels)).jobs)

    assert await found(team="x") == [b.job_id, a.job_id]
    assert await found(team="x", run="1") == [a.job_id]
    assert await found(team="1") == []
    assert await found((JobState.QUEUED,)) == [c.job_id, b.job_id]
    assert await found((JobState.QUEUED,), team="x") == [b.job_id]
    assert await found((JobState.RUNNING, JobState.FAILED)) == [a.job_id]


async def test_jobs_are_counted_by_state(store: SqlJobStore) -> None:
    await added(store, new_job(), new_job())
    await added(store, new_job(owner="bert"))
    (job,) = await claimed(store)
    await finished(store, job)
    assert await store.counts() == {JobState.QUEUED: 2, JobState.SUCCEEDED: 1}
    assert await store.counts(OWNER) == {JobState.QUEUED: 1}


# --- claims -------------------------------------------------------------------------------------------


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


# --- the end ------------------------------------------------------------------------------------------


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
    ended = [e for e, result in zip(endings, results, strict=True) if result is None and e.state.has_ended]
    (first,) = ended
    assert (kept.state, kept.end_time, kept.images) == (first.state, first.end_time, first.images)
    assert all(isinstance(result, ClaimLostError) for result in results if result is not None)


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
    await store.renew("replica-1", [job.job_id], 0.0)
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
    assert (oldest.job_id, oldest.owner, oldest.image_bytes) == (second.job_id, OWNER, 3_000_000_000)
    assert newest.job_id == first.job_id
    assert await store.ended(limit=1) == (oldest,)
    assert await store.ended(before_time=newest.end_time) == (oldest,)
    usage = await store.usage()
    assert (usage.num_ended_jobs, usage.image_bytes) == (2, 3_000_000_500)
    assert await store.known([first.job_id, "no such job"]) == {first.job_id}


async def test_a_caller_whose_jobs_are_all_deleted_is_new_again(store: SqlJobStore) -> None:
    for caller in ("a", "b"):
        await added(store, new_job(caller=caller))
        done = await finished(store, (await claimed(store))[0])
        if caller == "b":
            await store.delete(OWNER, done.job_id)
    a, b = await added(store, new_job(caller="a"), new_job(caller="b"))
    assert await store.queue_order() == (b.job_id, a.job_id)


async def test_nothing_is_added_for_nothing(store: SqlJobStore) -> None:
    assert await store.add((), ROOMY) == ()
