"""What the job service does when a store fails, when it drains, and when jobs are old."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest

from hidream_grpc.engine.requests import SnapshotTaken, StepFinished
from hidream_grpc.errors import (
    JobInternalError,
    JobNotEndedError,
    JobNotFoundError,
    NotServingError,
    StorageFullError,
)
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.job import JobState, StoredImage
from hidream_grpc.jobs.retention.retention import RetentionLimits
from hidream_grpc.jobs.watching.events import Failed, ImagePart, Restarted
from hidream_grpc.model.parameters import GenerationParameters
from tests.support.job_stores import claimed, eventually
from tests.support.snapshots import packed_snapshot
from tests.unit.jobs.service_bench import DATA, TIMEOUT_SECONDS, Bench, bench_in, draw, submission, until


class FullStore(ArtifactStore):
    """A store that says what `contract/test_artifact_folder.py` shows a real one to say on a full disk."""

    async def write(
        self, job_id: str, claim_number: int, index: int, parameters: GenerationParameters, data: bytes
    ) -> StoredImage:
        raise StorageFullError(job_id, len(data))


async def test_a_full_disk_fails_the_job_and_tells_how_much_had_no_room(tmp_path: Path) -> None:
    async with bench_in(tmp_path, artifacts=FullStore(tmp_path)) as bench:
        job = await bench.submit(submission(num_images=2))
        draw(await bench.take())
        end = await bench.end(job.job_id)
        await bench.ended(job.job_id, JobState.FAILED)
    assert isinstance(end, Failed)
    assert isinstance(end.error, StorageFullError)
    assert (end.error.job_id, end.error.size_bytes) == (job.job_id, len(DATA))
    assert bench.engine.cancelled == [f"{job.job_id}/1"]
    assert bench.service.num_ended(JobState.FAILED) == 1


async def test_a_job_whose_image_cannot_be_stored_waits_until_the_store_is_back(bench: Bench) -> None:
    job = await bench.submit(submission())
    images = bench.directory / "artifacts" / "images"
    images.write_bytes(b"a file in the folder's place")
    draw(await bench.take())
    await bench.state(job.job_id, JobState.RUNNING)
    images.unlink()
    await bench.ended(job.job_id, JobState.SUCCEEDED)
    assert await bench.image(job.job_id) == DATA


async def test_a_store_with_a_defect_fails_the_job_with_an_error_id_that_the_log_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class DefectiveStore(ArtifactStore):
        async def write(
            self, job_id: str, claim_number: int, index: int, parameters: GenerationParameters, data: bytes
        ) -> StoredImage:
            raise KeyError(job_id)

    async with bench_in(tmp_path, artifacts=DefectiveStore(tmp_path)) as bench:
        job = await bench.submit(submission())
        draw(await bench.take())
        end = await bench.end(job.job_id)
        await bench.ended(job.job_id, JobState.FAILED)
    assert isinstance(end, Failed)
    assert isinstance(end.error, JobInternalError)
    assert end.error.error_id in [getattr(record, "error_id", "") for record in caplog.records]


async def test_draining_lets_running_jobs_end_and_keeps_the_others_for_the_next_start(tmp_path: Path) -> None:
    async with bench_in(tmp_path) as bench:
        running, _ = [await bench.submit(submission(name)) for name in ("a", "b")]
        request, other = await bench.take(), await bench.take()
        waiting = await bench.submit(submission("c"))
        drain = asyncio.create_task(bench.service.drain(TIMEOUT_SECONDS))
        await until(lambda: bench.service.readiness.is_draining)
        with pytest.raises(NotServingError):
            await bench.submit(submission("late"))
        draw(request)
        await bench.ended(running.job_id, JobState.SUCCEEDED)
        assert not drain.done()
        draw(other)
        await drain
        assert await bench.taken() is None
        with pytest.raises(NotServingError):
            await bench.events(waiting.job_id)
    async with bench_in(tmp_path) as bench:
        assert await bench.run() == waiting.job_id


async def test_draining_waits_until_the_images_are_read(bench: Bench) -> None:
    job = await bench.submit(submission())
    await bench.run()
    async with aclosing(bench.service.follow(None, job.job_id)) as events:
        await anext(events)
        drain = asyncio.create_task(bench.service.drain(TIMEOUT_SECONDS))
        parts = [event async for event in events if isinstance(event.body, ImagePart)]
        assert not drain.done()
    assert len(parts) == 3
    await drain


async def test_an_idle_service_is_drained_at_once(bench: Bench) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await bench.service.drain(3600)
    assert bench.service.readiness.is_draining


async def test_a_job_that_does_not_end_within_the_grace_period_goes_on_after_the_next_start(
    tmp_path: Path,
) -> None:
    async with bench_in(tmp_path) as bench:
        job = await bench.submit(submission())
        request = await bench.take()
        request.on_event(StepFinished(1, 0.1))
        request.on_event(SnapshotTaken(1, packed_snapshot(1, request.parameters)))
        await bench.state(job.job_id, JobState.RUNNING)
        await bench.service.drain(0.01)
        assert set(bench.engine.cancelled) == {f"{job.job_id}/1"}
        with pytest.raises(NotServingError):
            await bench.events(job.job_id)
        assert (await bench.service.get(None, job.job_id)).state is JobState.QUEUED
    async with bench_in(tmp_path) as bench:
        assert (await bench.take()).snapshot == packed_snapshot(1, request.parameters)


async def test_a_job_whose_server_is_killed_is_gone_on_with_and_its_reader_told(tmp_path: Path) -> None:
    async with bench_in(tmp_path) as bench:
        job = await bench.submit(submission())
        await bench.take()
        started = await bench.state(job.job_id, JobState.RUNNING)
        # What a killed server leaves: a row that says RUNNING.
        await bench.service.executor.release_all()
        (claim,) = await claimed(bench.store, "killed")
        row = claim.started(started.execution, 1.0) if started.execution else claim
        await bench.store.save(row)
    async with bench_in(tmp_path) as bench:
        reader = asyncio.create_task(bench.events(job.job_id))
        draw(await bench.take())
        events = await reader
    restarts = [event.body for event in events if isinstance(event.body, Restarted)]
    assert [(restart.attempt, restart.resumed_from_step) for restart in restarts] == [(2, 0)]
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))


async def is_gone(bench: Bench, job_id: str) -> bool:
    try:
        await bench.service.get(None, job_id)
    except JobNotFoundError:
        return True
    return False


async def test_a_job_and_its_images_go_when_their_time_is_over(tmp_path: Path) -> None:
    async with bench_in(tmp_path, RetentionLimits(retention_seconds=0.05, max_retained_jobs=10)) as bench:
        job = await bench.submit(submission())
        draw(await bench.take())
        await until(lambda: bench.service.num_ended(JobState.SUCCEEDED) == 1)
        await until(lambda: not bench.image_folders())
        assert await eventually(partial(is_gone, bench, job.job_id))
        assert (await bench.submit(submission())).job_id != job.job_id


async def test_no_more_jobs_are_kept_than_allowed_the_oldest_go_first(tmp_path: Path) -> None:
    async with bench_in(tmp_path, RetentionLimits(3600, max_retained_jobs=2)) as bench:
        jobs = []
        for number in range(4):
            jobs.append((await bench.submit(submission(f"r{number}"))).job_id)
            await bench.run()
        await until(lambda: bench.image_folders() == set(jobs[2:]))
        assert (bench.service.num_accepted, bench.service.num_ended(JobState.SUCCEEDED)) == (4, 4)


async def test_a_job_that_is_being_read_keeps_its_images_until_the_reader_leaves(tmp_path: Path) -> None:
    async with bench_in(tmp_path, RetentionLimits(retention_seconds=0.0)) as bench:
        job, other = [await bench.submit(submission(name)) for name in ("read", "other")]
        async with aclosing(bench.service.follow(None, job.job_id)) as events:
            await anext(events)
            for request in (await bench.take(), await bench.take()):
                draw(request)
            data, reader = b"", bench.service.image_reader(job.job_id)
            async for event in events:
                if isinstance(part := event.body, ImagePart):
                    await until(lambda: other.job_id not in bench.image_folders())
                    data += await reader.read(part.image, part.offset, part.length)
        assert data == DATA
        await until(lambda: not bench.image_folders())


async def test_deleting_removes_row_and_images_of_a_job_that_has_ended(bench: Bench) -> None:
    job = await bench.submit(submission())
    with pytest.raises(JobNotEndedError):
        await bench.service.delete(None, job.job_id)
    await bench.run()
    await bench.service.delete(None, job.job_id)
    assert not bench.image_folders()
    with pytest.raises(JobNotFoundError):
        await bench.service.get(None, job.job_id)
