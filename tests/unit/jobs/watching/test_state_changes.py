"""A reader of all states is told each one that it asked for, also after it missed some."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import NotServingError, StoreUnavailableError
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store import changes as store_changes
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching import changed_jobs as changed_jobs_module
from hidream_grpc.jobs.watching.changed_jobs import ChangedJobs, JobChange
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


@pytest.fixture(autouse=True)
def read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changed_jobs_module, "GATHER_SECONDS", 0.0)


@pytest.fixture
async def changed_jobs(store: SqlJobStore) -> AsyncIterator[ChangedJobs]:
    changed_jobs = ChangedJobs(store)
    work = asyncio.create_task(changed_jobs.run())
    # It has subscribed.
    await asyncio.sleep(0)
    yield changed_jobs
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


class Reader:
    """Follows changes and notes them."""

    def __init__(
        self,
        store: SqlJobStore,
        changed_jobs: ChangedJobs,
        owner: str | None = OWNER,
        *states: JobState,
        **labels: str,
    ) -> None:
        self._changes = StateChanges(store, changed_jobs, owner, states, labels).follow()

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._changes.aclose()

    async def next(self) -> JobChange:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await anext(self._changes)

    async def told(self, num_changes: int) -> list[tuple[str, JobState]]:
        """The next changes."""
        found = [await self.next() for _ in range(num_changes)]
        return [(change.job.job_id, change.job.state) for change in found]


@contextmanager
def counted_statements() -> Iterator[list[str]]:
    """The statements that any store executes within the block."""
    statements: list[str] = []

    def count(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", count)
    try:
        yield statements
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", count)


async def cancelled(store: SqlJobStore, job: Job) -> None:
    await store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)


async def test_changes_that_were_missed_are_made_up_for_and_nothing_is_told_twice(
    store: SqlJobStore, changed_jobs: ChangedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_changes, "MAX_PENDING_CHANGES", 3)
    (done, same, dropped) = await added(store, new_job(), new_job(), new_job())
    async with Reader(store, changed_jobs) as reader:
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
    store: SqlJobStore, changed_jobs: ChangedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_changes, "MAX_PENDING_CHANGES", 1)
    waits, other = await added(store, new_job(), new_job())
    async with Reader(store, changed_jobs, OWNER, QUEUED) as reader:
        await reader.told(2)
        await cancelled(store, waits)
        await cancelled(store, other)
        assert set(await reader.told(2)) == {(waits.job_id, CANCELLED), (other.job_id, CANCELLED)}


async def test_jobs_of_others_and_without_the_label_are_not_told(
    store: SqlJobStore, changed_jobs: ChangedJobs
) -> None:
    async with Reader(store, changed_jobs, OWNER, team="x") as reader:
        await added(store, new_job(owner="bert", labels={"team": "x"}))
        await added(store, new_job(), new_job(labels={"team": "y"}))
        (mine,) = await added(store, new_job(labels={"team": "x", "more": ""}))
        assert await reader.told(1) == [(mine.job_id, QUEUED)]


async def test_who_may_see_all_jobs_is_told_of_all(store: SqlJobStore, changed_jobs: ChangedJobs) -> None:
    async with Reader(store, changed_jobs, None) as reader:
        jobs = *await added(store, new_job(owner="bert")), *await added(store, new_job())
        assert set(await reader.told(2)) == {(job.job_id, QUEUED) for job in jobs}


async def test_a_service_that_goes_away_ends_the_stream_with_its_error_after_the_last_change(
    store: SqlJobStore, changed_jobs: ChangedJobs
) -> None:
    async with Reader(store, changed_jobs) as reader, Reader(store, changed_jobs) as other:
        (job,) = await added(store, new_job())
        assert await reader.told(1) == await other.told(1) == [(job.job_id, QUEUED)]
        await cancelled(store, job)
        changed_jobs.close(CLOSING)
        for one in (reader, other):
            assert await one.told(1) == [(job.job_id, CANCELLED)]
            with pytest.raises(NotServingError):
                await one.next()
    async with Reader(store, changed_jobs) as late:
        assert await late.told(1) == [(job.job_id, CANCELLED)]
        with pytest.raises(NotServingError):
            await late.next()


async def test_a_change_is_read_once_however_many_follow_and_all_get_the_same(
    store: SqlJobStore, changed_jobs: ChangedJobs
) -> None:
    async def num_statements(num_readers: int) -> int:
        """Count those of an acceptance, a cancellation and a deletion, all of which the readers are told."""
        async with AsyncExitStack() as stack:
            readers = [
                await stack.enter_async_context(Reader(store, changed_jobs, OWNER, batch=str(num_readers)))
                for _ in range(num_readers)
            ]
            await added(store, new_job(labels={"batch": str(num_readers)}))
            await asyncio.gather(*(reader.told(1) for reader in readers))
            with counted_statements() as statements:
                (job,) = await added(store, new_job(labels={"batch": str(num_readers)}))
                changes = await asyncio.gather(*(reader.next() for reader in readers))
                assert changes[0].job.job_id == job.job_id
                assert len(set(map(id, changes))) == 1
                await cancelled(store, job)
                await asyncio.gather(*(reader.told(1) for reader in readers))
                await store.delete(OWNER, job.job_id)
            return len(statements)

    assert await num_statements(1) == await num_statements(40)


class SlowStore(SqlJobStore):
    """A store whose answer about changed jobs is held back."""

    def __init__(self, location: Path) -> None:
        super().__init__(location)
        self.has_read, self.may_answer = asyncio.Event(), asyncio.Event()

    async def get_readable(self, job_ids: Collection[str]) -> tuple[Job, ...]:
        jobs = await super().get_readable(job_ids)
        self.has_read.set()
        await self.may_answer.wait()
        return jobs


async def test_a_reader_that_has_seen_a_newer_state_is_not_told_an_older_one(tmp_path: Path) -> None:
    store = SlowStore(tmp_path / "jobs.sqlite")
    await store.open()
    changed_jobs = ChangedJobs(store)
    work = asyncio.create_task(changed_jobs.run())
    await asyncio.sleep(0)
    async with Reader(store, changed_jobs) as early, Reader(store, changed_jobs) as reader:
        first = asyncio.ensure_future(early.told(1))
        (job,) = await added(store, new_job())
        await store.has_read.wait()
        # Meanwhile the job ends, and the other reader comes.
        await cancelled(store, job)
        assert await reader.told(1) == [(job.job_id, CANCELLED)]
        store.may_answer.set()
        await first
        (other,) = await added(store, new_job())
        assert await reader.told(1) == [(other.job_id, QUEUED)]
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await store.close()


async def test_a_store_that_is_lost_ends_its_readers_and_later_ones_are_served(
    store: SqlJobStore, changed_jobs: ChangedJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(job_ids: Collection[str]) -> tuple[Job, ...]:
        raise StoreUnavailableError(1.0)

    monkeypatch.setattr(changed_jobs_module, "keep_doing", partial(keep_doing, retry_seconds=0.01))
    (job,) = await added(store, new_job())
    async with Reader(store, changed_jobs) as reader:
        await reader.told(1)
        with monkeypatch.context() as during:
            during.setattr(store, "get_readable", lost)
            await added(store, new_job(owner="bert"))
            with pytest.raises(StoreUnavailableError):
                await reader.next()
    async with Reader(store, changed_jobs) as reader:
        assert await reader.told(1) == [(job.job_id, QUEUED)]
        await cancelled(store, job)
        assert await reader.told(1) == [(job.job_id, CANCELLED)]
