"""Places in the queue are read once for all who ask, and told to those who wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path

import pytest

from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.executor import ClaimLimits
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobEvent, Queued
from hidream_grpc.jobs.watching.feeds import JobFeeds
from hidream_grpc.jobs.watching.queue_positions import QueuePositions
from tests.support.job_stores import MODEL, OWNER, added, claimed, eventually, new_job

TIMEOUT_SECONDS = 10.0


class CountingStore(SqlJobStore):
    """A store that counts how often the queue is read, and can be lost."""

    num_reads = 0
    num_jobs_read = 0
    is_lost = False

    async def queue_orders(
        self, model_fingerprint: str, max_running_jobs_of_caller: int | None = None
    ) -> Mapping[str, tuple[str, ...]]:
        self.num_reads += 1
        if self.is_lost:
            raise StoreUnavailableError(1.0)
        return await super().queue_orders(model_fingerprint, max_running_jobs_of_caller)

    async def get_all(self, job_ids: Collection[str]) -> tuple[Job, ...]:
        self.num_jobs_read += len(job_ids)
        return await super().get_all(job_ids)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CountingStore]:
    store = CountingStore(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}")
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def feeds(store: CountingStore) -> JobFeeds:
    return JobFeeds(store.clock.now)


@pytest.fixture
def positions(store: CountingStore, feeds: JobFeeds) -> QueuePositions:
    return positions_of(store, feeds)


def positions_of(
    store: CountingStore, feeds: JobFeeds, max_running_jobs_of_caller: int | None = None
) -> QueuePositions:
    estimator = JobEstimator(lambda: EngineCapacity(1, 1 << 20, num_ranks=1))
    return QueuePositions(store, feeds, estimator, ClaimLimits(1, max_running_jobs_of_caller, MODEL))


def numbers(answers: Sequence[Queued | None]) -> list[int | None]:
    return [None if position is None else position.queue_position for position in answers]


async def test_any_number_of_askers_read_the_queue_twice_at_most(
    store: CountingStore, positions: QueuePositions
) -> None:
    jobs = await added(store, *(new_job() for _ in range(30)))
    asked = await asyncio.gather(*(positions.of([job.job_id]) for job in jobs))
    assert [numbers(answer) for answer in asked] == [[position] for position in range(1, 31)]
    # The second is for those who asked while the first was being read.
    assert store.num_reads <= 2
    assert store.num_jobs_read == 30


async def test_a_job_that_waits_is_read_once_however_often_the_queue_is(
    store: CountingStore, positions: QueuePositions
) -> None:
    first = await added(store, *(new_job() for _ in range(10)))
    await positions.of([job.job_id for job in first])
    second = await added(store, new_job())
    assert numbers(await positions.of([job.job_id for job in (*first, *second)])) == list(range(1, 12))
    assert store.num_jobs_read == 11


async def test_what_does_not_wait_has_no_position(store: CountingStore, positions: QueuePositions) -> None:
    ended, waits = await added(store, new_job(), new_job())
    await store.request_cancel(OWNER, ended.job_id, CancelReason.REQUESTED)
    assert numbers(await positions.of([ended.job_id, waits.job_id, "unknown"])) == [None, 1, None]


async def test_a_caller_at_its_limit_of_running_jobs_has_its_position_behind_those_that_may_run(
    store: CountingStore, feeds: JobFeeds
) -> None:
    jobs = await added(
        store,
        new_job(caller="a", priority=Priority.HIGH),
        new_job(caller="a", priority=Priority.HIGH),
        new_job(caller="b", priority=Priority.LOW),
    )
    (running,) = await claimed(store)
    assert running.job_id == jobs[0].job_id
    waiting = [job.job_id for job in jobs[1:]]
    assert numbers(await positions_of(store, feeds).of(waiting)) == [1, 2]
    assert numbers(await positions_of(store, feeds, max_running_jobs_of_caller=1).of(waiting)) == [2, 1]


async def test_who_waits_is_told_each_new_position_also_after_the_store_was_lost(
    store: CountingStore, feeds: JobFeeds, positions: QueuePositions
) -> None:
    ahead, waits = await added(store, new_job(), new_job())
    told: list[int] = []

    async def read(events: AsyncIterator[JobEvent]) -> None:
        async for event in events:
            assert isinstance(event.body, Queued)
            # The same position is told again when the wait has changed.
            if told[-1:] != [event.body.queue_position]:
                told.append(event.body.queue_position)

    async def has_been_told(*positions: int) -> None:
        async def is_told() -> bool:
            return told == list(positions)

        await eventually(is_told)

    with feeds.used(waits.job_id, is_reader=True) as feed:
        tasks = [asyncio.create_task(read(feed.follow(0))), asyncio.create_task(positions.run())]
        await has_been_told(2)
        store.is_lost = True
        await store.request_cancel(OWNER, ahead.job_id, CancelReason.REQUESTED)
        num_reads = store.num_reads
        positions.notify()

        async def has_tried() -> bool:
            return store.num_reads > num_reads

        await eventually(has_tried)
        assert told == [2]
        store.is_lost = False
        await has_been_told(2, 1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
