"""The spans of a job that ends in the middle of its steps, and jobs whose spans cannot be made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hidream_grpc.engine.requests import EngineEvent, RequestFailed, RequestStarted, StepFinished
from hidream_grpc.errors import ClaimLostError, JobInternalError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.execution.job_spans import JobSpans
from hidream_grpc.jobs.execution.running_job import LOST_CLAIM, RunningJob
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobFeed, Progressed
from hidream_grpc.traces import FinishedSpan, RecordSpan, TraceContext
from tests.support.job_stores import OWNER, StoreDatabase, added, claimed, new_job
from tests.support.job_tools import tools_of

TRACE = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
TIMEOUT_SECONDS = 10.0


async def ended(
    database: StoreDatabase,
    folder: Path,
    record: RecordSpan,
    end: Callable[[RunningJob], None],
    step: EngineEvent,
) -> Job:
    """The job as it is kept, once `end` has ended it after its first step and one more event."""
    store = SqlJobStore(database.url, end_observers=(JobSpans(record).observe_end,))
    await store.open()
    try:
        await added(store, replace(new_job(), trace=TRACE.child()))
        (job,) = await claimed(store)
        feed = JobFeed()
        running = RunningJob(job, feed, tools_of(store, ArtifactStore(folder), record))
        for event in (RequestStarted(), StepFinished(1, 0.1, (0.1,)), step):
            running.receive(event)
        task = asyncio.create_task(running.run())
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async for told in feed.follow():
                if isinstance(told.body, Progressed) and told.body.progress.step == 2:
                    break
            end(running)
            await asyncio.gather(task, return_exceptions=True)
        error = task.exception()
        assert error is None or isinstance(error, ClaimLostError)
        return await store.get(OWNER, job.job_id)
    finally:
        await store.close()


def cancel(running: RunningJob) -> None:
    running.cancel(CancelReason.REQUESTED)


def fail(running: RunningJob) -> None:
    running.receive(RequestFailed(JobInternalError("e1d2")))


@pytest.mark.parametrize(
    ("end", "state", "error"),
    [
        pytest.param(cancel, "CANCELLED", None, id="cancelled"),
        pytest.param(fail, "FAILED", str(JobInternalError("e1d2")), id="failed"),
        pytest.param(RunningJob.lose, "LOST", LOST_CLAIM, id="lost"),
        pytest.param(RunningJob.give_back, "QUEUED", None, id="given back"),
    ],
)
async def test_steps_that_end_before_the_last_one_say_what_became_of_the_job(
    end: Callable[[RunningJob], None],
    state: str,
    error: str | None,
    sqlite_database: StoreDatabase,
    tmp_path: Path,
) -> None:
    spans: list[FinishedSpan] = []
    await ended(sqlite_database, tmp_path / "artifacts", spans.append, end, StepFinished(2, 0.1, (0.1,)))
    (denoise,) = (span for span in spans if span.name == "denoise")
    assert (denoise.attributes.get("hidream.state"), denoise.error) == (state, error)
    assert len(denoise.events) == 2


@pytest.mark.parametrize("end", [cancel, fail])
async def test_spans_that_cannot_be_made_change_no_job_and_cost_one_line(
    end: Callable[[RunningJob], None],
    sqlite_database: StoreDatabase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class LibraryError(Exception):
        """New to the log."""

    def record(span: FinishedSpan) -> None:
        raise LibraryError("out of order")

    job = await ended(sqlite_database, tmp_path / "artifacts", record, end, StepFinished(2, 0.1, (0.1,)))
    assert job.state is (JobState.CANCELLED if end is cancel else JobState.FAILED)
    if end is fail:
        assert "e1d2" in str(job.error)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert lines == ["a span is lost: LibraryError: out of order (not logged again)"]


async def test_a_step_that_does_not_fit_the_one_before_costs_the_span_and_not_the_job(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    other_ranks = StepFinished(2, 0.1, (0.1, 0.1))
    job = await ended(sqlite_database, tmp_path / "artifacts", lambda span: None, cancel, other_ranks)
    assert job.state is JobState.CANCELLED
