from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore, StoredFile, image_file
from hidream_grpc.jobs.artifacts.orphans import OrphanedFiles, is_named
from hidream_grpc.jobs.job import CancelReason, Job, StoredSnapshot
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import StoreDatabase, added, claimed, new_job, started, succeeded, with_image


def snapshot_file(job: Job, claim_number: int) -> StoredFile:
    return StoredFile(f"snapshots/{job.job_id}/{claim_number}", job.job_id, claim_number, None)


def running(claim_number: int) -> Job:
    return started(replace(new_job(), claim_number=claim_number))


def test_what_a_running_claim_writes_stays_before_its_row_names_it() -> None:
    job = running(3)
    assert is_named(image_file(job.job_id, 3, 0), job)
    assert is_named(snapshot_file(job, 3), job)
    assert not is_named(image_file(job.job_id, 2, 0), job)
    assert not is_named(snapshot_file(job, 2), job)


def test_images_and_snapshot_of_an_earlier_claim_stay_as_long_as_the_row_names_them() -> None:
    job = replace(with_image(running(1)), claim_number=2, snapshot=StoredSnapshot(1, 5))
    assert is_named(image_file(job.job_id, 1, 0), job)
    assert not is_named(image_file(job.job_id, 1, 1), job)
    assert is_named(snapshot_file(job, 1), job)


def test_a_job_that_has_ended_keeps_the_images_of_its_row_and_nothing_else() -> None:
    job = succeeded(replace(with_image(running(2)), snapshot=StoredSnapshot(2, 3)))
    assert is_named(image_file(job.job_id, 2, 0), job)
    assert not is_named(image_file(job.job_id, 3, 0), job), "written by a server that was late"
    assert not is_named(snapshot_file(job, 2), job)


def test_without_a_job_nothing_is_named_and_with_an_unreadable_one_everything_is() -> None:
    job = running(1)
    assert not is_named(image_file(job.job_id, 1, 0), None)
    assert is_named(image_file(job.job_id, 9, 0), replace(job, is_unreadable=True))


async def with_files(store: SqlJobStore, artifacts: ArtifactStore) -> Job:
    """A job that ended with one image, and beside it files of a server that was late, or killed."""
    await added(store, new_job())
    (job,) = await claimed(store)
    await artifacts.write(job.job_id, job.claim_number, 0, job.submission.parameters, bytes(1000))
    job = with_image(started(job))
    await store.save(succeeded(job))
    await artifacts.write(job.job_id, job.claim_number + 1, 0, job.submission.parameters, b"late")
    await artifacts.write("0" * 32, 1, 0, job.submission.parameters, b"late")
    await artifacts.write_snapshot(job.job_id, job.claim_number, b"late")
    return job


def keys(folder: Path) -> set[str]:
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found - {"store_id"}


async def test_a_sweep_leaves_the_files_that_rows_name(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts"
    artifacts = ArtifactStore(folder)
    async with sqlite_database.opened() as store:
        job = await with_files(store, artifacts)
        await artifacts.set_store_id(await store.store_id())
        (folder / "images" / ("f" * 32)).mkdir()
        (folder / "images" / ("f" * 32) / "0#1").write_bytes(b"staged by a writer that was killed")
        await OrphanedFiles(store, artifacts).sweep()
    assert keys(folder) == {f"images/{job.job_id}/1/0"}
    assert {path.name for path in (folder / "images").iterdir()} == {job.job_id}, "no empty folder is left"


async def test_files_of_another_job_store_are_left_alone(
    sqlite_database: StoreDatabase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "artifacts"
    artifacts = ArtifactStore(folder)
    await artifacts.set_store_id("another store of jobs")
    async with sqlite_database.opened() as store:
        await with_files(store, artifacts)
        before = keys(folder)
        with caplog.at_level(logging.WARNING):
            await OrphanedFiles(store, artifacts).sweep()
            await OrphanedFiles(store, artifacts).sweep()
    assert keys(folder) == before
    assert "belongs to another job store" in caplog.text


async def test_files_that_no_job_store_has_claimed_are_left_alone_by_one_that_does_not_know_them(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts"
    artifacts = ArtifactStore(folder)
    await artifacts.write("1" * 32, 1, 0, new_job().submission.parameters, b"of a production server")
    async with sqlite_database.opened() as store:
        await OrphanedFiles(store, artifacts).sweep()
        assert keys(folder) == {f"images/{'1' * 32}/1/0"}
        assert await artifacts.store_id() is None
        await with_files(store, artifacts)
        before = keys(folder)
        await OrphanedFiles(store, artifacts).sweep()
        assert keys(folder) == before, "to know one of them is not enough"
        await artifacts.set_store_id(await store.store_id())
        await OrphanedFiles(store, artifacts).sweep()
        assert keys(folder) < before


async def test_what_a_lost_claim_wrote_goes_unless_the_row_names_it(
    sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    folder = tmp_path / "artifacts"
    artifacts = ArtifactStore(folder)
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (lost,) = await claimed(store)
        await artifacts.write(lost.job_id, 1, 0, lost.submission.parameters, b"late")
        await store.remove_replica("replica-1")
        (job,) = await claimed(store, "replica-2")
        await artifacts.write(job.job_id, 2, 0, job.submission.parameters, bytes(1000))
        await OrphanedFiles(store, artifacts).remove_lost(lost)
        await store.request_cancel(None, job.job_id, CancelReason.REQUESTED)
    assert keys(folder) == {f"images/{job.job_id}/2/0"}
