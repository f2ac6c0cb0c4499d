"""Jobs are counted when something has changed, and no oftener."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs import counts
from hidream_grpc.jobs.counts import JobCounts
from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import added, eventually, new_job, queue_order


class CountedStore(SqlJobStore):
    """A store that notes how often its jobs are counted, and can be lost."""

    num_counts = 0
    is_lost = False

    async def counts(self) -> Counter[JobState]:
        self.num_counts += 1
        if self.is_lost:
            raise StoreUnavailableError(1.0)
        return await super().counts()


async def test_many_changes_at_once_are_one_count_and_a_lost_store_leaves_the_old_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "PAUSE_SECONDS", 0.001)
    store = CountedStore(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}")
    await store.open()
    job_counts = JobCounts(store)
    work = asyncio.create_task(job_counts.run())

    async def has_counted(num_queued: int) -> None:
        async def is_counted() -> bool:
            return job_counts[JobState.QUEUED] == num_queued

        await eventually(is_counted)

    async def has_tried(num_counts: int) -> None:
        async def is_tried() -> bool:
            return store.num_counts > num_counts

        await eventually(is_tried)

    await added(store, *(new_job() for _ in range(300)))
    await has_counted(300)
    num_counts = store.num_counts
    for _ in range(50):
        await queue_order(store)
    assert store.num_counts <= num_counts + 1
    store.is_lost = True
    await added(store, new_job())
    await has_tried(store.num_counts)
    await job_counts.refresh()
    assert job_counts[JobState.QUEUED] == 300
    store.is_lost = False
    await has_counted(301)
    assert job_counts[JobState.RUNNING] == 0
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await store.close()
