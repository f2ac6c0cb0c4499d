"""A reader of all states is told each one that it asked for, also after it missed some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from hidream_grpc.errors import NotServingError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import changes as store_changes
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.state_changes import StateChanges
from tests.support.job_stores import OWNER, StoreDatabase, added, claimed, finished, new_job

CLOSING = NotServingError("going away", 1.0)
TIMEOUT_SECONDS = 10.0
QUEUED, SUCCEEDED, CANCELLED = JobState.QUEUED, JobState.SUCCEEDED, JobState.CANCELLED


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqlJobStore]:
    async with StoreDatabase(
        f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", is_file=True
    ).opened() as store:
        yield store


class Reader:
    """Follows changes and notes them."""

    def __init__(
        self, store: SqlJobStore, owner: str | None = OWNER, *states: JobState, **labels: str
    ) -> None:
        self.closed = asyncio.Event()
        self._changes = StateChanges(store, owner, states, labels).follow(self.closed, CLOSING)

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._changes.aclose()

    async def told(self, num_changes: int) -> list[tuple[str, JobState]]:
        """The next changes."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            found = [await anext(self._changes) for _ in range(num_changes)]
        return [(change.job.job_id, change.job.state) for change in found]


async def cancelled(store: SqlJobStore, job: Job) -> None:
    await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)


async def test_changes_that_were_missed_are_made_up_for_and_nothing_is_told_twice(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_changes, "MAX_PENDING_CHANGES", 3)
    (done, same, dropped) = await added(store, new_job(), new_job(), new_job())
    async with Reader(store) as reader:
        assert {job_id for job_id, _ in await reader.told(3)} == {job.job_id for job in (done, same, dropped)}
        # While the reader is away more happens than is kept for it.
        (claim,) = await claimed(store)
        assert claim.job_id == done.job_id
        await finished(store, claim)
        await cancelled(store, dropped)
        await store.delete(OWNER, dropped.job_id)
        new = (await added(store, *(new_job() for _ in range(4))))[-1]
        told = await reader.told(5)
        assert (done.job_id, SUCCEEDED) in told
        assert (new.job_id, QUEUED) in told
        assert not {same.job_id, dropped.job_id} & {job_id for job_id, _ in told}
        # It goes on with what happens now.
        await cancelled(store, same)
        assert await reader.told(1) == [(same.job_id, CANCELLED)]


async def test_a_change_that_was_missed_is_told_where_it_left_the_states_that_were_asked_for(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_changes, "MAX_PENDING_CHANGES", 1)
    waits, other = await added(store, new_job(), new_job())
    async with Reader(store, OWNER, QUEUED) as reader:
        await reader.told(2)
        await cancelled(store, waits)
        await cancelled(store, other)
        assert set(await reader.told(2)) == {(waits.job_id, CANCELLED), (other.job_id, CANCELLED)}


async def test_jobs_of_others_and_without_the_label_are_not_told(store: SqlJobStore) -> None:
    async with Reader(store, OWNER, team="x") as reader:
        await added(store, new_job(owner="bert", labels={"team": "x"}))
        await added(store, new_job(), new_job(labels={"team": "y"}))
        (mine,) = await added(store, new_job(labels={"team": "x", "more": ""}))
        assert await reader.told(1) == [(mine.job_id, QUEUED)]


async def test_who_may_see_all_jobs_is_told_of_all(store: SqlJobStore) -> None:
    async with Reader(store, None) as reader:
        jobs = *await added(store, new_job(owner="bert")), *await added(store, new_job())
        assert set(await reader.told(2)) == {(job.job_id, QUEUED) for job in jobs}


async def test_a_service_that_goes_away_ends_the_stream_with_its_error(store: SqlJobStore) -> None:
    closed = asyncio.Event()
    async with aclosing(StateChanges(store, OWNER, (), {}).follow(closed, CLOSING)) as changes:
        waiting = asyncio.ensure_future(anext(changes))
        closed.set()
        with pytest.raises(NotServingError):
            await asyncio.wait_for(waiting, TIMEOUT_SECONDS)
