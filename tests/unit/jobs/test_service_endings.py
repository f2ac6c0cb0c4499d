"""What the job service does when the store fails, when it drains, and when jobs are old."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from hidream_grpc.engine.requests import (
    ImageFinished,
)
from hidream_grpc.errors import (
    ArtifactUnavailableError,
    JobInternalError,
    NotServingError,
    StorageFullError,
)
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.events import (
    Failed,
    ImagePart,
)
from hidream_grpc.jobs.job import CancelReason, JobState, StoredImage
from hidream_grpc.jobs.service import JobService, RetentionPolicy
from hidream_grpc.model.parameters import GenerationParameters
from tests.unit.jobs.service_bench import (
    DATA,
    TIMEOUT_SECONDS,
    Bench,
    bench_in,
    draw,
    submission,
)


class FullStore(ArtifactStore):
    """A store that says what `contract/test_artifact_store.py` shows a real one to say on a full disk."""

    async def write(
        self, job_id: str, index: int, parameters: GenerationParameters, data: bytes
    ) -> StoredImage:
        raise StorageFullError(job_id, len(data))


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


async def test_a_store_that_is_gone_fails_the_job_with_an_error_that_may_be_retried(bench: Bench) -> None:
    job = bench.service.submit(submission())
    (bench.directory / "images").write_bytes(b"a file in the folder's place")
    draw(bench.take())
    end = await bench.end(job.job_id)
    assert isinstance(end, Failed)
    assert isinstance(end.error, ArtifactUnavailableError)


async def test_a_store_with_a_defect_fails_the_job_with_an_error_id_that_the_log_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class DefectiveStore(ArtifactStore):
        async def write(
            self, job_id: str, index: int, parameters: GenerationParameters, data: bytes
        ) -> StoredImage:
            raise KeyError(job_id)

    bench = bench_in(tmp_path, store=DefectiveStore(tmp_path))
    job = bench.service.submit(submission())
    draw(bench.take())
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
    images = directory / "images"
    return {path.name for path in images.iterdir()} if images.exists() else set()


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
