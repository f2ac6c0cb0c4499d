"""What the job service promises from the acceptance of a job to its end."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import aclosing

import pytest

from hidream_grpc.engine.requests import (
    EngineRequest,
    EngineState,
    PreviewMade,
    Priority,
    PromptsEncoded,
    RequestFailed,
    RequestRestarted,
    StepFinished,
    StepReport,
)
from hidream_grpc.errors import (
    DeadlineExceededError,
    JobCancelledError,
    JobInternalError,
    JobNotFoundError,
    NotServingError,
    OutOfDeviceMemoryError,
    QueueFullError,
    RequestIdConflictError,
)
from hidream_grpc.jobs.deadlines import MIN_RETRY_SECONDS
from hidream_grpc.jobs.job import CancelReason, JobState, Submission
from hidream_grpc.jobs.watching.events import (
    Cancelled,
    Failed,
    ImagePart,
    Previewed,
    Progressed,
    Queued,
    Succeeded,
)
from hidream_grpc.model.parameters import SampleSize
from tests.support.job_stores import eventually
from tests.unit.jobs.service_bench import (
    DATA,
    EXECUTION,
    LIMITS,
    Bench,
    draw,
    kinds,
    submission,
    until,
)


async def test_a_job_is_followed_from_the_queue_to_its_images(bench: Bench) -> None:
    job = await bench.submit(submission(num_images=2))
    assert (job.state, await bench.num_queued()) == (JobState.QUEUED, 1)
    reader = asyncio.create_task(bench.events(job.job_id))
    draw(await bench.take())
    events = await reader
    assert kinds(events) == ["Queued", "Started", "Progressed", *["ImagePart"] * 6, "Succeeded"]
    ended = events[-1].body
    assert isinstance(ended, Succeeded)
    assert [image.seed for image in ended.job.images] == [7, 8]
    assert ended.job.timings.encode_seconds == 0.25
    assert ended.job.timings.decode_seconds == 1.0
    assert await bench.num_queued() == bench.service.num_running == 0
    assert bench.service.num_ended(JobState.SUCCEEDED) == 1


async def test_a_job_that_is_followed_when_it_has_ended_tells_all_that_is_kept(bench: Bench) -> None:
    job = await bench.submit(submission())
    reader = asyncio.create_task(bench.events(job.job_id))
    await bench.run()
    kept = [event for event in await reader if not isinstance(event.body, Queued | Progressed)]
    assert await bench.events(job.job_id) == kept


async def test_the_parts_told_can_be_read_and_make_the_image(bench: Bench) -> None:
    job = await bench.submit(submission())
    await bench.run()
    data, reader = b"", bench.service.image_reader(job.job_id)
    for event in await bench.events(job.job_id):
        if isinstance(part := event.body, ImagePart):
            data += await reader.read(part.image, part.offset, part.length)
    assert data == DATA


async def test_every_step_is_told_with_its_duration_and_the_time_that_is_left(bench: Bench) -> None:
    job = await bench.submit(submission())
    request = await bench.take()
    request.on_event(PromptsEncoded(0.1))
    remaining = []
    async with aclosing(bench.service.follow(None, job.job_id)) as events:
        for step in (1, 2, 3):
            request.on_event(StepFinished(step, step / 10))
            request.on_event(PreviewMade(step, b"jpeg"))
            async for event in events:
                if isinstance(event.body, Progressed):
                    progress = event.body.progress
                    assert (progress.step, progress.total_steps) == (step, 3)
                    assert progress.step_seconds == step / 10
                    remaining.append(progress.estimated_remaining_seconds)
                if isinstance(event.body, Previewed):
                    break
            bench.estimator.observe_step(StepReport(step / 10, 64, 64, num_samples=2))
    assert [seconds is None for seconds in remaining] == [True, False, False]
    assert remaining[-1] == 0


async def busy(bench: Bench) -> list[EngineRequest]:
    """Have as many jobs run as may."""
    for number in range(LIMITS.max_running_jobs):
        await bench.submit(submission(f"busy {number}"))
    requests = [await bench.take() for _ in range(LIMITS.max_running_jobs)]
    for request in requests:
        await bench.state(request.job_id, JobState.RUNNING)
    return requests


async def test_each_waiting_job_is_told_when_its_position_changes(bench: Bench) -> None:
    running, _ = await busy(bench)
    jobs = [await bench.submit(submission(f"r{n}", caller="same")) for n in range(3)]
    first, second, third = (job.job_id for job in jobs)

    async def position(job_id: str) -> int:
        async with aclosing(bench.service.follow(None, job_id)) as events:
            event = await anext(events)
        assert isinstance(event.body, Queued)
        return event.body.queue_position

    assert [await position(job_id) for job_id in (first, second, third)] == [1, 2, 3]
    assert [
        position and position.queue_position for position in await bench.service.queue_positions(jobs)
    ] == [1, 2, 3]
    async with aclosing(bench.service.follow(None, third)) as events:
        assert (await anext(events)).body == Queued(3)
        draw(running)
        assert (await bench.take()).job_id == first
        assert (await anext(events)).body == Queued(2)
        await bench.service.cancel(None, second, CancelReason.REQUESTED)
        assert (await anext(events)).body == Queued(1)
        in_front = await bench.submit(submission("in front", caller="another"))
        assert (await anext(events)).body == Queued(2)
    assert await position(in_front.job_id) == 1


async def test_a_waiting_job_is_told_how_long_once_a_step_was_measured(bench: Bench) -> None:
    requests = await busy(bench)
    waiting = (await bench.submit(submission("waiting"))).job_id
    async with aclosing(bench.service.follow(None, waiting)) as events:
        assert (await anext(events)).body == Queued(1, None)
        bench.estimator.observe_step(StepReport(0.5, 64, 64, num_samples=4))
        requests[0].on_event(StepFinished(1, 0.5))
        body = (await anext(events)).body
    # Two or three steps are left of those that run.
    assert isinstance(body, Queued)
    assert body.estimated_wait_seconds is not None
    assert 1.0 <= body.estimated_wait_seconds <= 1.5


async def test_a_full_queue_accepts_nothing_and_says_when_to_come_back(bench: Bench) -> None:
    running, _ = await busy(bench)
    for number in range(LIMITS.max_queued_jobs):
        await bench.submit(submission(f"r{number}"))
    num_accepted = bench.service.num_accepted
    with pytest.raises(QueueFullError) as refused:
        await bench.submit(submission("one too many"))
    assert refused.value.max_queued_jobs == LIMITS.max_queued_jobs
    assert refused.value.retry_after_seconds == MIN_RETRY_SECONDS
    assert bench.service.num_accepted == num_accepted
    draw(running)
    await bench.take()
    await bench.submit(submission("one too many"))


async def test_a_follow_up_on_a_job_is_welcome_when_the_queue_is_full(bench: Bench) -> None:
    await busy(bench)
    jobs = [await bench.submit(submission(f"r{number}")) for number in range(LIMITS.max_queued_jobs)]
    assert (await bench.submit(submission("r1"))).job_id == jobs[1].job_id
    assert bench.service.num_accepted == LIMITS.max_running_jobs + LIMITS.max_queued_jobs


async def test_a_batch_that_does_not_fit_leaves_nothing(bench: Bench) -> None:
    await busy(bench)
    with pytest.raises(QueueFullError):
        await bench.service.submit_all(
            [submission(f"r{number}") for number in range(LIMITS.max_queued_jobs + 1)], ""
        )
    assert await bench.num_queued() == 0
    accepted = await bench.service.submit_all([submission("r1"), submission("r2"), submission("r1")], "")
    assert [job.submission.request_id for job in accepted] == ["r1", "r2", "r1"]
    assert accepted[0].job_id == accepted[2].job_id
    assert bench.service.num_accepted == LIMITS.max_running_jobs + 2


@pytest.mark.parametrize(
    "other",
    [submission(seed=8), submission(priority=Priority.HIGH), submission(is_detached=True)],
    ids=["another seed", "another priority", "detached"],
)
async def test_a_request_id_of_another_request_is_refused(bench: Bench, other: Submission) -> None:
    job = await bench.submit(submission())
    with pytest.raises(RequestIdConflictError) as refused:
        await bench.submit(other)
    assert (refused.value.request_id, refused.value.job_id) == ("r", job.job_id)
    assert bench.service.num_accepted == 1


async def test_a_retry_with_another_deadline_is_the_same_request(bench: Bench) -> None:
    job = await bench.submit(submission(deadline_seconds=100))
    assert (await bench.submit(submission(deadline_seconds=50))).job_id == job.job_id


async def test_a_job_that_has_ended_is_followed_up_too_and_is_not_drawn_again(bench: Bench) -> None:
    job = await bench.submit(submission())
    await bench.run()
    again = await bench.submit(submission())
    assert (again.job_id, again.state) == (job.job_id, JobState.SUCCEEDED)
    assert await bench.taken() is None
    assert kinds(await bench.events(again.job_id))[-1] == "Succeeded"


async def test_a_retry_of_a_job_that_was_not_drawn_is_a_new_job(bench: Bench) -> None:
    cancelled = await bench.submit(submission())
    await bench.service.cancel(None, cancelled.job_id, CancelReason.CALLER_LEFT)
    failed = await bench.submit(submission())
    (await bench.take()).on_event(RequestFailed(JobInternalError.new()))
    await bench.ended(failed.job_id, JobState.FAILED)
    drawn = await bench.submit(submission())
    assert len({cancelled.job_id, failed.job_id, drawn.job_id}) == 3
    assert await bench.run() == drawn.job_id
    assert (await bench.submit(submission())).job_id == drawn.job_id


@pytest.mark.parametrize("later_seconds", [3600.0, None], ids=["a later deadline", "no deadline"])
async def test_a_retry_with_more_time_gives_its_job_more_time(
    bench: Bench, later_seconds: float | None
) -> None:
    retried = await bench.submit(submission("retried", deadline_seconds=600.0))
    await bench.submit(submission("retried", deadline_seconds=later_seconds))
    other = await bench.submit(submission("other", deadline_seconds=600.0))
    bench.clock.let_pass(600.0)
    assert isinstance(await bench.end(other.job_id), Cancelled)
    assert await bench.run() == retried.job_id


async def test_a_retry_with_less_time_does_not_shorten_the_job(bench: Bench) -> None:
    retried = await bench.submit(submission("retried", deadline_seconds=3600))
    await bench.submit(submission("retried", deadline_seconds=0.01))
    other = await bench.submit(submission("other", deadline_seconds=0.03))
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
        await bench.submit(submission())
    else:
        with pytest.raises(NotServingError) as refused:
            await bench.submit(submission())
        assert refused.value.retry_after_seconds > 0
    assert bench.service.num_accepted == is_accepted


async def test_a_cancelled_job_in_the_queue_is_never_taken(bench: Bench) -> None:
    await busy(bench)
    job = await bench.submit(submission())
    cancelled = await bench.service.cancel(None, job.job_id, CancelReason.REQUESTED)
    assert cancelled.state is JobState.CANCELLED
    assert await bench.taken() is None
    end = await bench.end(job.job_id)
    assert isinstance(end, Cancelled)
    assert (end.reason, type(end.error)) == (CancelReason.REQUESTED, JobCancelledError)
    assert bench.engine.cancelled == []
    assert bench.service.num_ended(JobState.CANCELLED) == 1


async def test_a_cancelled_job_that_runs_leaves_the_engine_and_reports_nothing_more(bench: Bench) -> None:
    job = await bench.submit(submission())
    reader = asyncio.create_task(bench.events(job.job_id))
    request = await bench.take()
    await bench.state(job.job_id, JobState.RUNNING)
    request.on_event(StepFinished(1, 0.1))
    await bench.service.cancel(None, job.job_id, CancelReason.CALLER_LEFT)
    assert bench.engine.cancelled == [f"{job.job_id}/1"]
    draw(request)
    assert kinds(await reader)[-1] == "Cancelled"
    await bench.ended(job.job_id, JobState.CANCELLED)
    assert bench.service.num_ended(JobState.CANCELLED) == 1
    assert not bench.image_folders()


async def test_cancelling_a_job_that_has_ended_changes_nothing(bench: Bench) -> None:
    await bench.submit(submission())
    job_id = await bench.run()
    ended = await bench.service.cancel(None, job_id, CancelReason.REQUESTED)
    assert ended.state is JobState.SUCCEEDED
    assert kinds(await bench.events(job_id))[-1] == "Succeeded"
    assert bench.service.num_ended(JobState.CANCELLED) == 0
    with pytest.raises(JobNotFoundError):
        await bench.service.cancel(None, "unknown", CancelReason.REQUESTED)


async def test_a_caller_that_leaves_stops_its_job_unless_another_caller_stays(bench: Bench) -> None:
    watched = await bench.submit(submission("watched"), call_id="watched 1")
    called = await bench.submit(submission("called"), call_id="called 1")
    assert (await bench.submit(submission("called"), call_id="called 2")).job_id == called.job_id
    async with aclosing(bench.service.follow(None, watched.job_id)) as events:
        await anext(events)
        bench.service.detach(called.job_id, "called 1", CancelReason.CALLER_LEFT)
        bench.service.detach(watched.job_id, "watched 1", CancelReason.CALLER_LEFT)
        await bench.ended(watched.job_id, JobState.CANCELLED)
        assert await bench.run() == called.job_id


async def test_a_running_job_that_its_last_caller_leaves_takes_no_further_step(bench: Bench) -> None:
    job = await bench.submit(submission(), call_id="call 1")
    await bench.submit(submission(), call_id="call 2")
    request = await bench.take()
    await bench.state(job.job_id, JobState.RUNNING)
    bench.service.detach(job.job_id, "call 2", CancelReason.CALLER_LEFT)
    request.on_event(StepFinished(1, 0.1))
    bench.service.detach(job.job_id, "call 1", CancelReason.DEADLINE)
    end = await bench.end(job.job_id)
    assert isinstance(end, Cancelled)
    assert (end.reason, type(end.error)) == (CancelReason.DEADLINE, DeadlineExceededError)
    assert set(bench.engine.cancelled) == {f"{job.job_id}/1"}


async def test_a_caller_that_leaves_without_a_reason_leaves_its_job_to_its_retry(bench: Bench) -> None:
    job = await bench.submit(submission("retried"), call_id="call 1")
    other = await bench.submit(submission("other"), call_id="call 2")
    bench.service.detach(job.job_id, "call 1", None)
    bench.service.detach(other.job_id, "call 2", CancelReason.CALLER_LEFT)
    await bench.ended(other.job_id, JobState.CANCELLED)
    assert (await bench.submit(submission("retried"), call_id="call 3")).job_id == job.job_id
    assert await bench.run() == job.job_id


class StreamBrokeError(Exception):
    """What ends a stream that nobody left."""


@pytest.mark.parametrize("is_detached", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("ending", [asyncio.CancelledError, GeneratorExit, StreamBrokeError])
async def test_an_attended_job_stops_when_its_caller_leaves_but_not_when_its_stream_breaks(
    bench: Bench, ending: type[BaseException], is_detached: bool
) -> None:
    what = submission(is_detached=is_detached)
    with pytest.raises(ending):
        async with bench.service.attended(what, "", None, lambda: CancelReason.DEADLINE) as job:
            raise ending
    if is_detached or ending is StreamBrokeError:
        assert await bench.run() == job.job_id
    else:
        assert (await bench.ended(job.job_id, JobState.CANCELLED)).cancel_reason is CancelReason.DEADLINE


async def test_a_caller_whose_connection_was_lost_finds_its_job_again_within_its_window(bench: Bench) -> None:
    async def attend(window_seconds: float) -> str:
        what = submission("mine")
        with pytest.raises(asyncio.CancelledError):
            async with bench.service.attended(
                what, "", None, lambda: CancelReason.CALLER_LEFT, window_seconds
            ) as job:
                raise asyncio.CancelledError
        return job.job_id

    await busy(bench)
    job_id = await attend(300.0)
    assert await attend(300.0) == job_id
    assert (await bench.service.get(None, job_id)).cancel_reason is None


async def test_a_caller_that_is_not_back_within_its_window_has_left(bench: Bench) -> None:
    with pytest.raises(asyncio.CancelledError):
        async with bench.service.attended(
            submission(), "", None, lambda: CancelReason.CALLER_LEFT, 0.01
        ) as job:
            raise asyncio.CancelledError
    assert (await bench.ended(job.job_id, JobState.CANCELLED)).cancel_reason is CancelReason.CALLER_LEFT


async def test_a_deadline_that_passes_waits_for_no_window(bench: Bench) -> None:
    with pytest.raises(asyncio.CancelledError):
        async with bench.service.attended(
            submission(), "", None, lambda: CancelReason.DEADLINE, 300.0
        ) as job:
            raise asyncio.CancelledError
    assert (await bench.ended(job.job_id, JobState.CANCELLED)).cancel_reason is CancelReason.DEADLINE


async def test_an_attended_job_that_has_ended_is_not_stopped(bench: Bench) -> None:
    async with bench.service.attended(submission(), "", None, lambda: CancelReason.CALLER_LEFT) as job:
        await bench.run()
    ended = await bench.service.get(None, job.job_id)
    assert (ended.state, ended.cancel_reason) == (JobState.SUCCEEDED, None)


async def test_a_caller_that_goes_while_its_job_is_accepted_leaves_none_that_is_drawn(bench: Bench) -> None:
    await busy(bench)
    for name, is_detached in (("awaited", False), ("detached", True)):
        call_id = "" if is_detached else name
        call = asyncio.create_task(bench.submit(submission(name, is_detached=is_detached), call_id=call_id))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def states() -> dict[str, JobState] | None:
        jobs = (await bench.service.list(None, (), {}, 10, "")).jobs
        found = {job.submission.request_id: job.state for job in jobs}
        return found if found.get("awaited") is JobState.CANCELLED and "detached" in found else None

    assert (await eventually(states))["detached"] is JobState.QUEUED


@pytest.mark.parametrize("deadline_seconds", [-1.0, 0.0, 0.02])
async def test_a_job_whose_deadline_has_passed_is_not_started(bench: Bench, deadline_seconds: float) -> None:
    await busy(bench)
    job = await bench.submit(submission(deadline_seconds=deadline_seconds))
    end = await bench.end(job.job_id)
    assert isinstance(end, Cancelled)
    assert (end.reason, type(end.error)) == (CancelReason.DEADLINE, DeadlineExceededError)
    assert await bench.taken() is None


async def test_a_running_job_stops_when_its_deadline_passes(bench: Bench) -> None:
    job = await bench.submit(submission(deadline_seconds=600.0))
    await bench.take()
    bench.clock.let_pass(600.0)
    assert isinstance(await bench.end(job.job_id), Cancelled)
    assert set(bench.engine.cancelled) == {f"{job.job_id}/1"}


async def test_a_detached_job_outlives_the_deadline_of_its_caller(bench: Bench) -> None:
    await bench.submit(submission("detached", is_detached=True, deadline_seconds=0.0))
    waits = await bench.submit(submission("attached", deadline_seconds=0.01))
    assert isinstance(await bench.end(waits.job_id), Cancelled)
    assert (await bench.take()).request_id == "detached"


async def test_a_failed_job_tells_its_error_and_leaves_the_others_alone(bench: Bench) -> None:
    failing, other = [await bench.submit(submission(name)) for name in ("a", "b")]
    error = OutOfDeviceMemoryError(failing.job_id)
    (await bench.take()).on_event(RequestFailed(error))
    assert await bench.end(failing.job_id) == Failed(error)
    assert await bench.run() == other.job_id
    await bench.ended(failing.job_id, JobState.FAILED)
    assert bench.service.num_ended(JobState.FAILED) == bench.service.num_ended(JobState.SUCCEEDED) == 1


async def test_a_restart_is_told_and_the_estimate_starts_anew(bench: Bench) -> None:
    job = await bench.submit(submission())
    request = await bench.take()
    request.on_event(PromptsEncoded(0.1))
    request.on_event(StepFinished(1, 0.1))
    request.on_event(RequestRestarted(2, "rank 1: killed by SIGKILL", 0))
    request.on_event(StepFinished(1, 0.1))
    async with aclosing(bench.service.follow(None, job.job_id)) as events:
        async for event in events:
            if isinstance(event.body, Progressed):
                break
    assert isinstance(event.body, Progressed)
    assert event.body.progress.estimated_remaining_seconds is None
    draw(request)
    end = await bench.end(job.job_id)
    assert isinstance(end, Succeeded)
    assert end.job.execution == dataclasses.replace(EXECUTION, attempt=2)


async def test_jobs_for_which_a_step_has_no_room_wait_and_the_engine_is_told_their_size(bench: Bench) -> None:
    # One alone fills a step.
    first = await bench.submit(submission("first", num_images=128))
    request = await bench.take()
    second = await bench.submit(submission("second", num_images=128))
    await until(lambda: list(bench.service.waiting_sizes) == [SampleSize(64, 64)])
    assert (await bench.service.get(None, second.job_id)).state is JobState.QUEUED
    await bench.submit(submission("urgent", priority=Priority.HIGH))
    urgent = await bench.take()
    assert (urgent.request_id, urgent.priority, urgent.caller) == ("urgent", Priority.HIGH, "caller")
    draw(urgent)
    for step in (1, 2, 3):
        request.on_event(StepFinished(step, 0.1))
    # The images of the first are still to be decoded.
    assert (await bench.take()).request_id == "second"
    assert (await bench.service.get(None, first.job_id)).state is JobState.RUNNING
