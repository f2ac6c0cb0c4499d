"""A caller that waits here for a job and goes is detached in the store, once that answers again."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from hidream_grpc.errors import JobNotFoundError, StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.replicas import attached_callers
from hidream_grpc.jobs.replicas.attached_callers import AttachedCallers
from hidream_grpc.jobs.store.records import AttachedCall
from tests.support.job_stores import eventually, new_job

CALL = AttachedCall("call", "replica")
LEFT = CancelReason.CALLER_LEFT


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
        self.callers = AttachedCallers(cast(Any, self.store), self.closed, self.cancelled.append)

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
