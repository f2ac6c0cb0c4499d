"""A reader of a job here gets what other replicas do to it, in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from hidream_grpc.background import keep_doing
from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import JobNotFoundError, StoreUnavailableError
from hidream_grpc.jobs.job import CancelReason, Job, Progress, claim_sequence
from hidream_grpc.jobs.replicas import messages, store_follower
from hidream_grpc.jobs.replicas.messages import ReplicaPublisher
from hidream_grpc.jobs.replicas.store_follower import StoreFollower
from hidream_grpc.jobs.store.changes import ChangeKind
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobEvent, JobFeed, Progressed, Restarted, Started, Succeeded
from hidream_grpc.jobs.watching.feeds import JobFeeds
from tests.support.job_stores import OWNER, added, claimed, eventually, finished, new_job, started

TIMEOUT_SECONDS = 10.0


class SharedStore(SqlJobStore):
    """A file that is told of as a shared database is; rows are read when the test says so."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.num_failures = 0
        self.num_published: list[int] = []

    @property
    def is_shared(self) -> bool:
        return True

    async def publish(self, payloads: Sequence[tuple[str, bytes]]) -> None:
        self.num_published.append(len(payloads))
        await super().publish(payloads)

    async def get(self, owner: str | None, job_id: str) -> Job:
        await self.may_read.wait()
        if self.num_failures:
            self.num_failures -= 1
            raise StoreUnavailableError(1.0)
        return await super().get(owner, job_id)


class NotedExecutor:
    """Holds the jobs that the test names, and notes which are to be stopped."""

    def __init__(self) -> None:
        self.held: dict[str, Job] = {}
        self.noticed_priorities: list[int | None] = []
        self.cancelled: list[tuple[str, CancelReason]] = []
        self.claims: list[tuple[str, int]] = []

    def job(self, job_id: str) -> Job | None:
        return self.held.get(job_id)

    def notify(self, priority: int | None = None) -> None:
        self.noticed_priorities.append(priority)

    def notify_changed(self, job_id: str) -> None:
        pass

    def note_claim(self, job_id: str, claim_number: int) -> None:
        self.claims.append((job_id, claim_number))

    def cancel(self, job_id: str, reason: CancelReason) -> None:
        self.cancelled.append((job_id, reason))


class Here:
    """One replica's view: its feeds, and its follower at work."""

    def __init__(self, store: SharedStore) -> None:
        self.store = store
        self.feeds = JobFeeds(store.clock.now)
        self.executor = NotedExecutor()
        self.follower = StoreFollower(store, self.feeds, cast(Any, self.executor))


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    store = SharedStore(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}")
    await store.open()
    here = Here(store)
    work = asyncio.create_task(here.follower.run())
    await asyncio.sleep(0)
    yield here
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    await store.close()


def progressed(job: Job, counter: int, step: int) -> JobEvent:
    body = Progressed(Progress(step, 4, 0.1, None))
    return JobEvent(claim_sequence(job.claim_number, counter), time.time(), body)


async def events(feed: JobFeed, count: int) -> list[JobEvent]:
    """The first events that a reader gets."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        found: list[JobEvent] = []
        async for event in feed.follow():
            found.append(event)
            if len(found) == count:
                break
        return found


async def test_what_another_replica_draws_is_told_from_its_start_to_its_end(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    with here.feeds.used(job.job_id, is_reader=True) as feed:
        (claim,) = await claimed(here.store, "another")
        await here.store.save(started(claim))
        assert isinstance((await events(feed, 1))[0].body, Started)
        done = await finished(here.store, claim)
        last = (await events(feed, 3))[-1]
        assert last.body == Succeeded(done)
        assert last.sequence == done.last_sequence


async def test_progress_that_overtakes_the_row_is_told_after_what_the_row_says(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    publisher = ReplicaPublisher(here.store)
    with here.feeds.used(job.job_id, is_reader=True) as feed:
        (claim,) = await claimed(here.store, "another")
        here.store.may_read.clear()
        await here.store.save(started(claim))
        publisher.publish(job.job_id, progressed(claim, 5, step=1))
        reading = asyncio.create_task(events(feed, 2))
        await asyncio.sleep(0.05)
        assert not reading.done()
        here.store.may_read.set()
        first, second = await reading
        assert isinstance(first.body, Started)
        assert second.body == Progressed(Progress(1, 4, 0.1, None))
        assert first.sequence < second.sequence


async def test_progress_is_told_now_and_then_and_every_restart(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "PUBLISH_INTERVAL_SECONDS", 3600.0)
    (job,) = await added(here.store, new_job())
    publisher = ReplicaPublisher(here.store)
    with here.store.subscribe() as changes:
        for step in (1, 2, 3):
            publisher.publish(job.job_id, progressed(job, step, step))
        for attempt in (2, 3):
            publisher.publish(job.job_id, JobEvent(9 + attempt, time.time(), Restarted(attempt, "lost", 1)))
        publisher.publish("another", progressed(job, 4, 4))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            told = [await anext(changes) for _ in range(4)]
    assert {change.kind for change in told} == {ChangeKind.PUBLISHED}
    assert [change.job_id for change in told] == [job.job_id] * 3 + ["another"]


async def test_jobs_that_step_together_are_told_of_in_one_transaction(here: Here) -> None:
    jobs = await added(here.store, *(new_job() for _ in range(16)))
    publisher = ReplicaPublisher(here.store)
    with here.store.subscribe() as changes:
        for job in jobs:
            publisher.publish(job.job_id, progressed(job, 1, 1))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            told = [await anext(changes) for _ in jobs]
            publisher.publish(jobs[0].job_id, JobEvent(2, time.time(), Restarted(2, "lost", 1)))
            told.append(await anext(changes))
    assert [change.job_id for change in told] == [job.job_id for job in (*jobs, jobs[0])]
    assert here.store.num_published == [16, 1]


async def test_a_row_that_cannot_be_read_is_read_when_the_store_is_back(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_follower, "keep_doing", partial(keep_doing, retry_seconds=0.01))
    (job,) = await added(here.store, new_job())
    with here.feeds.used(job.job_id, is_reader=True) as feed:
        here.store.num_failures = 3
        (claim,) = await claimed(here.store, "another")
        await here.store.save(started(claim))
        assert isinstance((await events(feed, 1))[0].body, Started)


async def test_a_job_that_is_deleted_elsewhere_ends_its_readers(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    await here.store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)
    with here.feeds.used(job.job_id, is_reader=True) as feed:
        await here.store.delete(OWNER, job.job_id)
        with pytest.raises(JobNotFoundError):
            await events(feed, 2)


async def test_a_job_that_is_drawn_here_and_cancelled_elsewhere_is_stopped(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    (claim,) = await claimed(here.store, "here")
    here.executor.held[job.job_id] = claim
    await here.store.request_cancel(OWNER, job.job_id, CancelReason.REQUESTED)

    async def is_stopped() -> bool:
        return here.executor.cancelled == [(job.job_id, CancelReason.REQUESTED)]

    await eventually(is_stopped)


async def test_what_is_drawn_here_is_told_by_who_draws_it_alone(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    other = (await added(here.store, new_job()))[0]
    with (
        here.feeds.used(job.job_id, is_reader=False) as feed,
        here.feeds.used(other.job_id, is_reader=True) as other_feed,
    ):
        (claim, other_claim) = await claimed(here.store, "here", limit=2)
        here.executor.held[job.job_id] = claim
        await here.store.save(started(claim))
        await here.store.save(started(other_claim))
        await events(other_feed, 1)
        assert feed.next_after(0) is None


async def test_who_draws_a_job_learns_that_another_has_claimed_it(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    await claimed(here.store, "here")
    await here.store.remove_replica("here")
    await claimed(here.store, "another")

    async def is_told() -> bool:
        return here.executor.claims[-1:] == [(job.job_id, 2)]

    await eventually(is_told)


async def test_what_only_another_version_says_is_passed_over(here: Here) -> None:
    (job,) = await added(here.store, new_job())
    with here.feeds.used(job.job_id, is_reader=True) as feed:
        for payload in (
            b'{"type":"new","what":1}',
            b"not even JSON",
            b'{"type":"relayed","sequence":1,"time":2}',
        ):
            await here.store.publish([(job.job_id, payload)])
        (claim,) = await claimed(here.store, "another")
        await here.store.save(started(claim))
        assert isinstance((await events(feed, 1))[0].body, Started)


async def test_a_claim_is_tried_for_jobs_that_wait_and_for_no_other_change(here: Here) -> None:
    jobs = await added(here.store, *(new_job() for _ in range(3)))
    claims = await claimed(here.store, "another", limit=3)
    for claim in claims:
        await here.store.save(started(claim))
    await finished(here.store, claims[0])
    await here.store.request_cancel(None, claims[1].job_id, CancelReason.REQUESTED)
    await here.store.delete(OWNER, claims[0].job_id)
    await here.store.release(claims[2])
    (last,) = await added(here.store, new_job())

    async def has_received_all() -> bool:
        return (last.job_id, 0) in here.executor.claims

    await eventually(has_received_all)
    # What is given back may be of any.
    new, given_back = [Priority.NORMAL], [None]
    assert here.executor.noticed_priorities == [*len(jobs) * new, *given_back, *new]
