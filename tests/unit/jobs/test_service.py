"""What the job service promises from the acceptance of a job to its end."""

from __future__ import annotations

import dataclasses
from contextlib import aclosing

import pytest

from hidream_grpc.engine.reports import StepReport
from hidream_grpc.engine.requests import (
    EngineState,
    PreviewMade,
    PromptsEncoded,
    RequestFailed,
    RequestRestarted,
    StepFinished,
)
from hidream_grpc.errors import (
    DeadlineExceededError,
    JobCancelledError,
    JobInternalError,
    NotServingError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestIdConflictError,
)
from hidream_grpc.jobs.events import (
    Cancelled,
    Failed,
    ImagePart,
    Previewed,
    Progressed,
    Queued,
    Succeeded,
)
from hidream_grpc.jobs.job import CancelReason, JobState, Priority, Submission
from hidream_grpc.jobs.service import MIN_RETRY_SECONDS
from tests.unit.jobs.service_bench import (
    DATA,
    EXECUTION,
    LIMITS,
    Bench,
    draw,
    kinds,
    submission,
)


async def test_a_job_is_followed_from_the_queue_to_its_images(bench: Bench) -> None:
    job = bench.service.submit(submission(num_images=2))
    assert (job.state, bench.service.num_queued, bench.engine.num_notices) == (JobState.QUEUED, 1, 1)
    request = bench.take()
    assert (bench.service.num_queued, bench.service.num_running) == (0, 1)
    draw(request)
    events = await bench.events(job.job_id)
    assert kinds(events) == ["Queued", "Started", "Progressed", *["ImagePart"] * 6, "Succeeded"]
    ended = events[-1].body
    assert isinstance(ended, Succeeded)
    assert [image.seed for image in ended.job.images] == [7, 8]
    assert ended.job.timings.encode_seconds == 0.25
    assert ended.job.timings.decode_seconds == 1.0
    assert (bench.service.num_running, bench.service.num_ended(JobState.SUCCEEDED)) == (0, 1)


async def test_the_parts_told_can_be_read_and_make_the_image(bench: Bench) -> None:
    job = bench.service.submit(submission())
    await bench.run()
    data = b""
    for event in await bench.events(job.job_id):
        if isinstance(part := event.body, ImagePart):
            data += await bench.service.read_image(job.job_id, part.image.index, part.offset, part.length)
    assert data == DATA


async def test_every_step_is_told_with_its_duration_and_the_time_that_is_left(bench: Bench) -> None:
    job = bench.service.submit(submission())
    request = bench.take()
    request.on_event(PromptsEncoded(0.1))
    remaining = []
    async with aclosing(bench.service.follow(job.job_id)) as events:
        for step in (1, 2, 3):
            request.on_event(StepFinished(step, step / 10))
            bench.outlook.observe_step(StepReport(step / 10, 64, 64, num_samples=2))
            request.on_event(PreviewMade(step, b"jpeg"))
            async for event in events:
                if isinstance(event.body, Progressed):
                    progress = event.body.progress
                    assert (progress.step, progress.total_steps) == (step, 3)
                    assert progress.step_seconds == step / 10
                    remaining.append(progress.estimated_remaining_seconds)
                if isinstance(event.body, Previewed):
                    break
    assert [seconds is None for seconds in remaining] == [True, False, False]
    assert remaining[-1] == 0


async def test_each_waiting_job_is_told_when_its_position_changes(bench: Bench) -> None:
    first, second, third = (bench.service.submit(submission(f"r{n}", caller="same")).job_id for n in range(3))

    async def position(job_id: str) -> int:
        async with aclosing(bench.service.follow(job_id)) as events:
            event = await anext(events)
        assert isinstance(event.body, Queued)
        return event.body.queue_position

    assert [await position(job_id) for job_id in (first, second, third)] == [1, 2, 3]
    bench.take()
    assert [await position(job_id) for job_id in (second, third)] == [1, 2]
    bench.service.cancel(second, CancelReason.REQUESTED)
    assert await position(third) == 1
    urgent = bench.service.submit(submission("urgent", priority=Priority.HIGH)).job_id
    assert [await position(job_id) for job_id in (urgent, third)] == [1, 2]


async def test_a_waiting_job_is_told_how_long_once_a_step_was_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hidream_grpc.jobs.service.POSITIONS_SECONDS", 0.0)
    for number in range(LIMITS.max_running_jobs):
        bench.service.submit(submission(f"r{number}"))
    requests = [bench.take() for _ in range(LIMITS.max_running_jobs)]
    waiting = bench.service.submit(submission("waiting")).job_id
    async with aclosing(bench.service.follow(waiting)) as events:
        assert (await anext(events)).body == Queued(1, None)
        bench.outlook.observe_step(StepReport(0.5, 64, 64, num_samples=4))
        requests[0].on_event(StepFinished(1, 0.5))
        body = (await anext(events)).body
    # Two or three steps are left of those that run.
    assert isinstance(body, Queued)
    assert body.estimated_wait_seconds is not None
    assert 1.0 <= body.estimated_wait_seconds <= 1.5


async def test_a_full_queue_accepts_nothing_and_says_when_to_come_back(bench: Bench) -> None:
    for number in range(LIMITS.max_queued_jobs):
        bench.service.submit(submission(f"r{number}"))
    with pytest.raises(QueueFullError) as refused:
        bench.service.submit(submission("one too many"))
    assert refused.value.max_queued_jobs == LIMITS.max_queued_jobs
    assert refused.value.retry_after_seconds == MIN_RETRY_SECONDS
    assert bench.service.num_accepted == LIMITS.max_queued_jobs
    bench.take()
    bench.service.submit(submission("one too many"))


async def test_a_follow_up_on_a_job_is_welcome_when_the_queue_is_full(bench: Bench) -> None:
    jobs = [bench.service.submit(submission(f"r{number}")) for number in range(LIMITS.max_queued_jobs)]
    assert bench.service.submit(submission("r1")) == jobs[1]
    assert bench.service.num_accepted == LIMITS.max_queued_jobs


@pytest.mark.parametrize(
    "other",
    [submission(seed=8), submission(priority=Priority.HIGH), submission(caller="another")],
    ids=["another seed", "another priority", "another caller"],
)
async def test_a_request_id_of_another_request_is_refused(bench: Bench, other: Submission) -> None:
    job = bench.service.submit(submission())
    with pytest.raises(RequestIdConflictError) as refused:
        bench.service.submit(other)
    assert (refused.value.request_id, refused.value.job_id) == ("r", job.job_id)
    assert bench.service.num_accepted == 1


async def test_a_retry_with_another_deadline_is_the_same_request(bench: Bench) -> None:
    job = bench.service.submit(submission(deadline_seconds=100))
    assert bench.service.submit(submission(deadline_seconds=50)).job_id == job.job_id


async def test_a_job_that_has_ended_is_followed_up_too_and_is_not_drawn_again(bench: Bench) -> None:
    job = bench.service.submit(submission())
    await bench.run()
    again = bench.service.submit(submission())
    assert (again.job_id, again.state) == (job.job_id, JobState.SUCCEEDED)
    assert bench.service.take() is None
    assert kinds(await bench.events(again.job_id))[-1] == "Succeeded"


async def test_a_retry_of_a_job_that_was_not_drawn_is_a_new_job(bench: Bench) -> None:
    cancelled = bench.service.submit(submission())
    bench.service.cancel(cancelled.job_id, CancelReason.CALLER_LEFT)
    failed = bench.service.submit(submission())
    bench.take().on_event(RequestFailed(JobInternalError.new()))
    drawn = bench.service.submit(submission())
    assert len({cancelled.job_id, failed.job_id, drawn.job_id}) == 3
    assert await bench.run() == drawn.job_id
    assert bench.service.submit(submission()).job_id == drawn.job_id


@pytest.mark.parametrize("later_seconds", [3600.0, None], ids=["a later deadline", "no deadline"])
async def test_a_retry_with_more_time_gives_its_job_more_time(
    bench: Bench, later_seconds: float | None
) -> None:
    retried = bench.service.submit(submission("retried", deadline_seconds=0.02))
    bench.service.submit(submission("retried", deadline_seconds=later_seconds))
    other = bench.service.submit(submission("other", deadline_seconds=0.04))
    assert isinstance(await bench.end(other.job_id), Cancelled)
    assert await bench.run() == retried.job_id


async def test_a_retry_with_less_time_does_not_shorten_the_job(bench: Bench) -> None:
    retried = bench.service.submit(submission("retried", deadline_seconds=3600))
    bench.service.submit(submission("retried", deadline_seconds=0.01))
    other = bench.service.submit(submission("other", deadline_seconds=0.03))
    assert isinstance(await bench.end(other.job_id), Cancelled)
    assert await bench.run() == retried.job_id


@pytest.mark.parametrize(
    ("state", "is_accepted"),
    [
        (EngineState.STARTING, False),
        (EngineState.SERVING, True),
        (EngineState.RECOVERING, True),
        (EngineState.FAILED, False),
        (EngineState.STOPPED, False),
    ],
)
async def test_requests_are_taken_only_while_the_ranks_work_or_will_soon(
    bench: Bench, state: EngineState, is_accepted: bool
) -> None:
    bench.service.set_engine_state(state)
    if is_accepted:
        bench.service.submit(submission())
    else:
        with pytest.raises(NotServingError) as refused:
            bench.service.submit(submission())
        assert refused.value.retry_after_seconds > 0
    assert bench.service.num_accepted == is_accepted


async def test_a_cancelled_job_in_the_queue_is_never_taken(bench: Bench) -> None:
    job = bench.service.submit(submission())
    bench.service.cancel(job.job_id, CancelReason.REQUESTED)
    assert bench.service.take() is None
    end = await bench.end(job.job_id)
    assert isinstance(end, Cancelled)
    assert (end.reason, type(end.error)) == (CancelReason.REQUESTED, JobCancelledError)
    assert bench.engine.cancelled == []


async def test_a_cancelled_job_that_runs_leaves_the_engine_and_reports_nothing_more(bench: Bench) -> None:
    job = bench.service.submit(submission())
    request = bench.take()
    request.on_event(StepFinished(1, 0.1))
    bench.service.cancel(job.job_id, CancelReason.CALLER_LEFT)
    assert bench.engine.cancelled == [job.job_id]
    draw(request)
    assert kinds(await bench.events(job.job_id))[-2:] == ["Progressed", "Cancelled"]
    assert (bench.service.num_running, bench.service.num_ended(JobState.CANCELLED)) == (0, 1)
    assert not (bench.directory / "images").exists()


async def test_cancelling_a_job_that_has_ended_or_never_was_changes_nothing(bench: Bench) -> None:
    bench.service.submit(submission())
    job_id = await bench.run()
    for name in (job_id, "unknown"):
        bench.service.cancel(name, CancelReason.REQUESTED)
    assert kinds(await bench.events(job_id))[-1] == "Succeeded"
    assert bench.service.num_ended(JobState.CANCELLED) == 0


@pytest.mark.parametrize("deadline_seconds", [-1.0, 0.0, 0.02])
async def test_a_job_whose_deadline_has_passed_is_not_started(bench: Bench, deadline_seconds: float) -> None:
    job = bench.service.submit(submission(deadline_seconds=deadline_seconds))
    end = await bench.end(job.job_id)
    assert isinstance(end, Cancelled)
    assert (end.reason, type(end.error)) == (CancelReason.DEADLINE, DeadlineExceededError)
    assert bench.service.take() is None


async def test_a_running_job_stops_when_its_deadline_passes(bench: Bench) -> None:
    job = bench.service.submit(submission(deadline_seconds=0.02))
    bench.take()
    assert isinstance(await bench.end(job.job_id), Cancelled)
    assert bench.engine.cancelled == [job.job_id]


async def test_a_detached_job_outlives_the_deadline_of_its_caller(bench: Bench) -> None:
    bench.service.submit(submission("detached", is_detached=True, deadline_seconds=0.0))
    waits = bench.service.submit(submission("attached", deadline_seconds=0.01))
    assert isinstance(await bench.end(waits.job_id), Cancelled)
    assert bench.take().request_id == "detached"


async def test_a_failed_job_tells_its_error_and_leaves_the_others_alone(bench: Bench) -> None:
    failing, other = (bench.service.submit(submission(name)) for name in ("a", "b"))
    error = OutOfDeviceMemoryError(failing.job_id)
    bench.take().on_event(RequestFailed(error))
    assert await bench.end(failing.job_id) == Failed(error)
    assert await bench.run() == other.job_id
    assert bench.service.num_ended(JobState.FAILED) == bench.service.num_ended(JobState.SUCCEEDED) == 1


async def test_a_restart_is_told_and_the_estimate_starts_anew(bench: Bench) -> None:
    job = bench.service.submit(submission())
    request = bench.take()
    request.on_event(PromptsEncoded(0.1))
    request.on_event(StepFinished(1, 0.1))
    request.on_event(RequestRestarted(2, "rank 1: killed by SIGKILL", 0))
    request.on_event(StepFinished(1, 0.1))
    async with aclosing(bench.service.follow(job.job_id)) as events:
        async for event in events:
            if isinstance(event.body, Progressed):
                break
    assert isinstance(event.body, Progressed)
    assert event.body.progress.estimated_remaining_seconds is None
    draw(request)
    end = await bench.end(job.job_id)
    assert isinstance(end, Succeeded)
    assert end.job.execution == dataclasses.replace(EXECUTION, attempt=2)
