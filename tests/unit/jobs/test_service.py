"""The job service with a small engine that the test drives, and a real artifact store."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hidream_grpc.engine.requests import (
    EngineRequest,
    EngineState,
    ImageFinished,
    PreviewMade,
    PromptsEncoded,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
    RequestStarted,
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
    StorageFullError,
)
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.events import (
    Body,
    Cancelled,
    Failed,
    ImagePart,
    JobEvent,
    Previewed,
    Progressed,
    Queued,
    Succeeded,
)
from hidream_grpc.jobs.job import CancelReason, Execution, JobState, Priority, StoredImage, Submission
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.service import JobService, RetentionPolicy
from hidream_grpc.model.parameters import GenerationParameters

LIMITS = RequestLimits(
    max_prompt_tokens=128,
    max_prompt_bytes=4096,
    size_multiple=16,
    min_side_pixels=64,
    max_pixels=1024 * 1024,
    max_num_inference_steps=150,
    max_guidance_scale=20.0,
    max_num_images=8,
    max_seed=2**32 - 8,
    max_queued_jobs=3,
    max_running_jobs=2,
    max_streams=10,
    max_request_id_bytes=128,
    max_labels=32,
    max_label_bytes=128,
    max_receive_message_bytes=1024 * 1024,
    chunk_bytes=1000,
    max_preview_side_pixels=128,
)
EXECUTION = Execution("demo", "UniPCMultistepScheduler", 3.0, "dp=2,tp=1,ep=1")
DATA = bytes(range(250)) * 10
TIMEOUT_SECONDS = 10


@dataclass
class DrivenEngine:
    """Notes what it is told; the test takes its jobs and reports on them."""

    num_notices: int = 0
    cancelled: list[str] = field(default_factory=list)

    def notify(self) -> None:
        self.num_notices += 1

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


@dataclass
class Bench:
    """A service, its engine and its store."""

    service: JobService
    engine: DrivenEngine
    directory: Path

    def take(self) -> EngineRequest:
        """Take the next job as the engine does, and start it."""
        request = self.service.take()
        assert request is not None
        request.on_event(RequestStarted())
        return request

    async def end(self, job_id: str) -> Body:
        """The last event of a job."""
        return (await self.events(job_id))[-1].body

    async def events(self, job_id: str) -> list[JobEvent]:
        """All events of a job that are still known, to its end."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return [event async for event in self.service.follow(job_id)]

    async def run(self) -> str:
        """Take the next job and finish it with all its images."""
        request = self.take()
        draw(request)
        await self.end(request.job_id)
        return request.job_id


def bench_in(
    directory: Path,
    retention: RetentionPolicy = RetentionPolicy(3600, 100),  # noqa: B008
    store: ArtifactStore | None = None,
) -> Bench:
    engine = DrivenEngine()
    artifacts = store or ArtifactStore(directory)
    service = JobService(LIMITS, retention, artifacts, engine, lambda: EXECUTION)
    service.set_engine_state(EngineState.SERVING)
    return Bench(service, engine, directory)


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return bench_in(tmp_path)


def submission(
    request_id: str = "r",
    caller: str = "caller",
    priority: Priority = Priority.NORMAL,
    is_detached: bool = False,
    deadline_seconds: float | None = None,
    seed: int = 7,
    num_images: int = 1,
) -> Submission:
    return Submission(
        GenerationParameters(
            prompt="a red circle",
            width=64,
            height=64,
            num_inference_steps=3,
            guidance_scale=5.0,
            num_images=num_images,
            seed=seed,
        ),
        request_id,
        caller,
        priority,
        is_detached=is_detached,
        deadline_seconds=deadline_seconds,
    )


def draw(request: EngineRequest) -> None:
    """Report a whole job, from its encoded prompts to its last image."""
    request.on_event(PromptsEncoded(0.25))
    for step in range(1, request.parameters.num_inference_steps + 1):
        request.on_event(StepFinished(step, 0.1))
    for index in range(request.parameters.num_images):
        request.on_event(ImageFinished(index, DATA, 0.5))
    request.on_event(RequestFinished())


def kinds(events: list[JobEvent]) -> list[str]:
    return [type(event.body).__name__ for event in events]


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


async def test_a_full_queue_accepts_nothing_and_says_when_to_come_back(bench: Bench) -> None:
    for number in range(LIMITS.max_queued_jobs):
        bench.service.submit(submission(f"r{number}"))
    with pytest.raises(QueueFullError) as refused:
        bench.service.submit(submission("one too many"))
    assert refused.value.max_queued_jobs == LIMITS.max_queued_jobs
    assert refused.value.retry_after_seconds > 0
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
    assert not (bench.directory / job.job_id).exists()


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


class FullStore(ArtifactStore):
    """A real store on a disk that is full: the kernel's /dev/full stands in for the file."""

    def _path(self, job_id: str, index: int) -> Path:
        path = super()._path(job_id, index)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        if not partial.is_symlink():
            partial.symlink_to("/dev/full")
        return path


async def test_a_full_disk_fails_the_job_and_tells_how_much_had_no_room(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, store=FullStore(tmp_path))
    job = bench.service.submit(submission(num_images=2))
    draw(bench.take())
    end = await bench.end(job.job_id)
    assert isinstance(end, Failed)
    assert isinstance(end.error, StorageFullError)
    assert (end.error.job_id, end.error.size_bytes) == (job.job_id, len(DATA))
    assert bench.engine.cancelled == [job.job_id]
    assert bench.service.num_ended(JobState.FAILED) == 1


async def test_a_store_that_is_gone_fails_the_job_with_an_error_id_that_the_log_has(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    job = bench.service.submit(submission())
    request = bench.take()
    bench.directory.rmdir()
    draw(request)
    end = await bench.end(job.job_id)
    assert isinstance(end, Failed)
    assert isinstance(end.error, JobInternalError)
    assert end.error.error_id in [getattr(record, "error_id", "") for record in caplog.records]


async def test_draining_refuses_new_jobs_and_lets_the_accepted_ones_end(bench: Bench) -> None:
    running, waiting = (bench.service.submit(submission(name)) for name in ("a", "b"))
    request = bench.take()
    drain = asyncio.create_task(bench.service.drain(TIMEOUT_SECONDS))
    await asyncio.sleep(0)
    with pytest.raises(NotServingError):
        bench.service.submit(submission("late"))
    draw(request)
    await bench.end(running.job_id)
    assert not drain.done()
    assert await bench.run() == waiting.job_id
    await asyncio.wait_for(drain, TIMEOUT_SECONDS)
    assert bench.service.num_ended(JobState.SUCCEEDED) == 2


async def test_draining_waits_until_the_images_are_read(bench: Bench) -> None:
    job = bench.service.submit(submission())
    await bench.run()
    async with aclosing(bench.service.follow(job.job_id)) as events:
        await anext(events)
        drain = asyncio.create_task(bench.service.drain(TIMEOUT_SECONDS))
        parts = [event async for event in events if isinstance(event.body, ImagePart)]
        assert not drain.done()
    assert len(parts) == 3
    await asyncio.wait_for(drain, TIMEOUT_SECONDS)


async def test_an_idle_service_is_drained_at_once(bench: Bench) -> None:
    await asyncio.wait_for(bench.service.drain(3600), TIMEOUT_SECONDS)
    assert bench.service.is_draining


async def test_jobs_that_do_not_end_within_the_grace_period_fail_as_unavailable(bench: Bench) -> None:
    running, waiting = (bench.service.submit(submission(name)) for name in ("a", "b"))
    bench.take()
    await bench.service.drain(0.01)
    for job in (running, waiting):
        end = await bench.end(job.job_id)
        assert isinstance(end, Failed)
        assert isinstance(end.error, NotServingError)
    assert bench.engine.cancelled == [running.job_id]
    assert bench.service.take() is None


async def eventually(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fail when it does not in time."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def is_known(service: JobService, job_id: str) -> bool:
    try:
        async with aclosing(service.follow(job_id)) as events:
            await anext(events)
    except KeyError:
        return False
    return True


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def test_a_job_and_its_images_go_when_their_time_is_over(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, RetentionPolicy(retention_seconds=0.05, max_retained_jobs=10))
    job = bench.service.submit(submission())
    await bench.run()
    await eventually(lambda: not names_in(tmp_path))
    assert bench.service.submit(submission()).job_id != job.job_id


async def test_no_more_jobs_are_kept_than_allowed_the_oldest_go_first(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, RetentionPolicy(3600, max_retained_jobs=2))
    jobs = []
    for number in range(4):
        jobs.append(bench.service.submit(submission(f"r{number}")).job_id)
        await bench.run()
    await eventually(lambda: names_in(tmp_path) == set(jobs[2:]))
    assert (bench.service.num_accepted, bench.service.num_ended(JobState.SUCCEEDED)) == (4, 4)


async def test_a_job_that_is_being_read_keeps_its_images_until_the_reader_leaves(tmp_path: Path) -> None:
    bench = bench_in(tmp_path, RetentionPolicy(retention_seconds=0, max_retained_jobs=1))
    job = bench.service.submit(submission())
    async with aclosing(bench.service.follow(job.job_id)) as events:
        await anext(events)
        draw(bench.take())
        data = b""
        async for event in events:
            if isinstance(part := event.body, ImagePart):
                for other in range(2):
                    name = f"{part.offset} {other}"
                    bench.service.submit(submission(name))
                    await bench.run()
                data += await bench.service.read_image(job.job_id, part.image.index, part.offset, part.length)
    assert data == DATA
    await eventually(lambda: not names_in(tmp_path))


async def test_a_job_that_is_removed_while_an_image_is_written_leaves_no_file(tmp_path: Path) -> None:
    released, written = asyncio.Event(), asyncio.Event()

    class SlowStore(ArtifactStore):
        async def write(
            self, job_id: str, index: int, parameters: GenerationParameters, data: bytes
        ) -> StoredImage:
            await released.wait()
            image = await super().write(job_id, index, parameters, data)
            written.set()
            return image

    retention = RetentionPolicy(retention_seconds=0, max_retained_jobs=1)
    bench = bench_in(tmp_path, retention, SlowStore(tmp_path))
    job = bench.service.submit(submission())
    bench.take().on_event(ImageFinished(0, DATA, 0.1))
    bench.service.cancel(job.job_id, CancelReason.REQUESTED)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while await is_known(bench.service, job.job_id):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    released.set()
    await asyncio.wait_for(written.wait(), TIMEOUT_SECONDS)
    await eventually(lambda: not names_in(tmp_path))


async def test_the_service_knows_who_reads(bench: Bench) -> None:
    job = bench.service.submit(submission())
    assert not bench.service.has_readers(job.job_id)
    async with aclosing(bench.service.follow(job.job_id)) as first:
        await anext(first)
        async with aclosing(bench.service.follow(job.job_id)) as second:
            await anext(second)
        assert bench.service.has_readers(job.job_id)
    assert not bench.service.has_readers(job.job_id)
