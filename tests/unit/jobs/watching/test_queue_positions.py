"""Places in the queue are read once for all who ask, and told to those who wait."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from hidream_grpc.engine.requests import Priority, StepReport
from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import MAX_SIMULATED_JOBS, EngineCapacity
from hidream_grpc.jobs.execution.executor import ClaimLimits
from hidream_grpc.jobs.job import CancelReason
from hidream_grpc.jobs.store.order import CallerLoads
from hidream_grpc.jobs.store.records import QueuedJob
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching import queue_positions
from hidream_grpc.jobs.watching.events import JobEvent, Queued
from hidream_grpc.jobs.watching.feeds import JobFeeds
from hidream_grpc.jobs.watching.queue_positions import QueuePositions
from tests.support.job_stores import MODEL, OWNER, added, claimed, eventually, new_job

TIMEOUT_SECONDS = 10.0


class CountingStore(SqlJobStore):
    """A store that counts how often waiting jobs are read, and can be lost."""

    num_reads = 0
    num_jobs_read = 0
    num_loads_read = 0
    is_lost = False

    async def caller_loads(
        self, model_fingerprint: str, max_running_jobs_of_caller: int | None = None
    ) -> CallerLoads:
        self.num_loads_read += 1
        return await super().caller_loads(model_fingerprint, max_running_jobs_of_caller)

    async def waiting_among(self, job_ids: Collection[str]) -> tuple[QueuedJob, ...]:
        return self._note(await super().waiting_among(job_ids))

    async def waiting_after(self, acceptance_number: int, limit: int) -> tuple[QueuedJob, ...]:
        return self._note(await super().waiting_after(acceptance_number, limit))

    def _note(self, queued: tuple[QueuedJob, ...]) -> tuple[QueuedJob, ...]:
        self.num_reads += 1
        self.num_jobs_read += len(queued)
        if self.is_lost:
            raise StoreUnavailableError(1.0)
        return queued


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


@asynccontextmanager
async def followed(positions: QueuePositions) -> AsyncIterator[None]:
    """The changes of the store are followed within the block."""
    work = asyncio.create_task(positions.run())
    # It has subscribed.
    await asyncio.sleep(0)
    try:
        yield
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def numbers(answers: Sequence[Queued | None]) -> list[int | None]:
    return [None if position is None else position.queue_position for position in answers]


async def test_any_number_of_askers_read_the_queue_twice_at_most(
    store: CountingStore, positions: QueuePositions
) -> None:
    jobs = await added(store, *(new_job() for _ in range(30)))
    asked = await asyncio.gather(*(positions.of([job.job_id]) for job in jobs))
    assert [numbers(answer) for answer in asked] == [[position] for position in range(1, 31)]
    # The second is for those who asked while the first was being read; each ends with an empty page.
    assert store.num_reads <= 4
    assert store.num_jobs_read <= 60


async def test_a_row_that_cannot_be_read_leaves_the_newest_job_its_position_and_its_estimate(
    store: CountingStore, feeds: JobFeeds, tmp_path: Path
) -> None:
    estimator = JobEstimator(lambda: EngineCapacity(1, 1 << 20, num_ranks=1))
    estimator.observe_step(StepReport(1.0, 64, 64, 2))
    positions = QueuePositions(store, feeds, estimator, ClaimLimits(1, None, MODEL))
    jobs = await added(store, *(new_job() for _ in range(MAX_SIMULATED_JOBS + 3)))
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database, database:
        database.execute("UPDATE jobs SET submission = '{' WHERE job_id = ?", [jobs[-1].job_id])
    async with followed(positions):
        await positions.of([jobs[0].job_id])
        before = estimator.wait_seconds(jobs[-2].job_id)
        (newest,) = await added(store, new_job())
        (position,) = await positions.of([newest.job_id])
        assert position is not None
        assert position.queue_position == len(jobs) + 1
        assert before is not None and position.estimated_wait_seconds is not None
        assert position.estimated_wait_seconds > before


async def test_a_job_that_waits_is_read_once_and_a_queue_at_rest_not_at_all(
    store: CountingStore, positions: QueuePositions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PAUSE_SECONDS", "REFRESH_SECONDS", "DURATIONS_SECONDS"):
        monkeypatch.setattr(queue_positions, name, 0.001)
    first = await added(store, *(new_job() for _ in range(10)))
    async with followed(positions):
        await positions.of([job.job_id for job in first])
        for _ in range(5):
            (job,) = await added(store, new_job())
            first += (job,)
            assert numbers(await positions.of([job.job_id])) == [len(first)]
        ended = first[3]
        await store.request_cancel(OWNER, ended.job_id, CancelReason.REQUESTED)

        async def is_gone() -> bool:
            return numbers(await positions.of([first[4].job_id])) == [4]

        await eventually(is_gone)
        assert store.num_jobs_read == 15
        num_reads = store.num_reads
        # Its estimates are made again meanwhile, many times.
        num_turns = 0
        with monkeypatch.context() as counting:

            def estimate_durations() -> None:
                nonlocal num_turns
                num_turns += 1

            counting.setattr(positions, "_estimate_durations", estimate_durations)

            async def has_turned() -> bool:
                return num_turns >= 5

            await eventually(has_turned)
        assert store.num_reads == num_reads


async def test_in_a_large_queue_a_new_job_has_its_position_without_another_look_at_the_others(
    store: CountingStore, positions: QueuePositions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_positions, "SMALL_QUEUE", 5)
    jobs = await added(store, *(new_job(caller="many") for _ in range(20)))
    async with followed(positions):
        assert numbers(await positions.of([jobs[-1].job_id])) == [20]
        num_jobs_read, num_orders = store.num_jobs_read, store.num_loads_read
        monkeypatch.setattr(queue_positions, "MAX_SHARE", 1e-9)
        (last,) = await added(store, new_job(caller="many"))
        (urgent,) = await added(store, new_job(caller="many", priority=Priority.HIGH))
        (other,) = await added(store, new_job(caller="one"))
        asked = [last.job_id, urgent.job_id, other.job_id]
        assert [numbers(await positions.of([job_id])) for job_id in asked] == [[21], [1], [2]]
        assert store.num_jobs_read == num_jobs_read + 3
        assert store.num_loads_read == num_orders
        monkeypatch.setattr(queue_positions, "MAX_SHARE", 1e9)
        everything = [job.job_id for job in (urgent, other, *jobs, last)]
        assert numbers(await positions.of(everything)) == list(range(1, 24))
        assert store.num_loads_read == num_orders + 1


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
        num_reads = store.num_reads
        await store.request_cancel(OWNER, ahead.job_id, CancelReason.REQUESTED)

        async def has_tried() -> bool:
            return store.num_reads > num_reads

        await eventually(has_tried)
        assert told == [2]
        store.is_lost = False
        await has_been_told(2, 1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
