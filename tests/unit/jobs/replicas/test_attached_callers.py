"""A caller that waits here for a job and goes is detached in the store, once that answers again."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from hidream_grpc.errors import JobCancelledError, JobNotFoundError, StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.replicas import attached_callers
from hidream_grpc.jobs.replicas.attached_callers import AttachedCallers
from hidream_grpc.jobs.store.records import AttachedCall
from hidream_grpc.jobs.watching.events import Cancelled
from hidream_grpc.jobs.watching.feeds import JobFeeds
from tests.support.job_stores import eventually, new_job

CALL = AttachedCall("call", "replica")
LEFT = CancelReason.CALLER_LEFT
MAX_LOST_CALLS = 2
WINDOW_SECONDS = 300.0


class NotedStore:
    """Notes who leaves, once it has failed as often as the test says."""

    def __init__(self, *failures: Exception, cancelled: Job | None = None) -> None:
        self.failures = list(failures)
        self.cancelled = cancelled
        self.detached: list[tuple[str, AttachedCall, CancelReason | None]] = []
        self.num_calls = 0

    async def detach(self, job_id: str, call: AttachedCall, reason: CancelReason | None) -> Job | None:
        self.num_calls += 1
        if self.failures:
            raise self.failures.pop(0)
        self.detached.append((job_id, call, reason))
        return self.cancelled


class Bench:
    def __init__(self, *failures: Exception, cancelled: Job | None = None) -> None:
        self.store = NotedStore(*failures, cancelled=cancelled)
        self.closed = asyncio.Event()
        self.cancelled: list[Job] = []
        self.feeds = JobFeeds(time.time)
        self.callers = AttachedCallers(
            cast(Any, self.store), self.feeds, MAX_LOST_CALLS, self.closed, self.cancelled.append
        )

    async def has_called(self, num_calls: int) -> None:
        async def is_done() -> bool:
            return self.store.num_calls >= num_calls

        await eventually(is_done)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached_callers, "RETRY_SECONDS", 0.001)


async def test_a_job_that_its_last_caller_left_is_stopped_here_if_it_is_drawn_here() -> None:
    job = new_job()
    bench = Bench(cancelled=job)
    bench.callers.detach(job.job_id, CALL, LEFT)
    await bench.has_called(1)
    assert bench.store.detached == [(job.job_id, CALL, LEFT)]
    assert bench.cancelled == [job]


async def test_a_job_that_somebody_else_waits_for_goes_on() -> None:
    bench = Bench()
    bench.callers.detach("job", CALL, LEFT)
    await bench.has_called(1)
    assert bench.cancelled == []


async def test_a_store_that_is_lost_or_full_is_told_once_it_answers_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = new_job()
    failures = (StoreUnavailableError(1.0), StoreFullError(1.0), StoreUnavailableError(1.0))
    bench = Bench(*failures, cancelled=job)
    bench.callers.detach(job.job_id, CALL, LEFT)
    await bench.has_called(4)
    assert bench.store.detached == [(job.job_id, CALL, LEFT)]
    assert bench.cancelled == [job]
    assert len(caplog.records) == 1


async def test_a_job_that_was_removed_meanwhile_is_left_alone() -> None:
    bench = Bench(JobNotFoundError("job"))
    bench.callers.detach("job", CALL, LEFT)
    bench.callers.detach("other", CALL, LEFT)
    await bench.has_called(2)
    assert bench.store.detached == [("other", CALL, LEFT)]


async def test_a_lost_call_is_waited_for_until_its_job_ends() -> None:
    job, bench = new_job(), Bench()
    bench.callers.detach_later(job, CALL, LEFT, WINDOW_SECONDS)

    async def is_waited_for() -> bool:
        return bench.feeds.get(job.job_id) is not None

    async def is_forgotten() -> bool:
        return bench.feeds.get(job.job_id) is None

    await eventually(is_waited_for)
    feed = bench.feeds.get(job.job_id)
    assert feed is not None
    feed.publish(Cancelled(CancelReason.REQUESTED, JobCancelledError(job.job_id)))
    await eventually(is_forgotten)
    assert bench.store.num_calls == 0


async def test_of_too_many_lost_calls_of_one_caller_the_oldest_are_detached() -> None:
    bench = Bench()
    jobs = [new_job() for _ in range(MAX_LOST_CALLS + 2)]
    for job in jobs:
        bench.callers.detach_later(job, CALL, LEFT, WINDOW_SECONDS)
    await bench.has_called(2)
    assert [job_id for job_id, _, _ in bench.store.detached] == [job.job_id for job in jobs[:2]]
    assert bench.feeds.job_ids == tuple(job.job_id for job in jobs[2:])


async def test_nobody_leaves_a_server_that_goes_away() -> None:
    bench = Bench(*(StoreUnavailableError(1.0) for _ in range(10_000)))
    bench.callers.detach("left before", CALL, LEFT)
    await bench.has_called(3)
    bench.closed.set()
    num_calls = bench.store.num_calls
    bench.callers.detach("left after", CALL, LEFT)
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.store.num_calls <= num_calls + 1
    assert bench.store.detached == []
