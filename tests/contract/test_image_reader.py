from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import pytest_asyncio

from hidream_grpc.errors import ImageDamagedError, JobNotFoundError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.artifacts.image_reader import ImageReader
from hidream_grpc.jobs.job import Job, StoredImage
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import StoreDatabase, added, claimed, new_job, started, succeeded

DATA = bytes(range(256)) * 4
PIECE_BYTES = 300


@dataclass
class Shelf:
    """A job with one image, in both stores."""

    store: SqlJobStore
    artifacts: ArtifactStore
    job: Job
    file: Path

    @property
    def image(self) -> StoredImage:
        return self.job.images[0]

    def reader(self) -> ImageReader:
        return ImageReader(self.job.job_id, self.store, self.artifacts)

    async def read(self, offset: int = 0) -> bytes:
        """Read it as a stream does, from an offset to its end."""
        reader, data = self.reader(), b""
        while offset + len(data) < self.image.size_bytes:
            data += await reader.read(self.image, offset + len(data), PIECE_BYTES)
        return data


@pytest_asyncio.fixture
async def shelf(sqlite_database: StoreDatabase, tmp_path: Path) -> AsyncIterator[Shelf]:
    artifacts = ArtifactStore(tmp_path / "artifacts")
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (job,) = await claimed(store)
        job = started(job)
        image = await artifacts.write(job.job_id, 1, 0, job.submission.parameters, DATA)
        job = succeeded(job.with_image(replace(image, first_sequence=9, chunk_bytes=PIECE_BYTES), 0.1))
        await store.save(job)
        yield Shelf(store, artifacts, job, tmp_path / "artifacts" / "images" / job.job_id / "1" / "0")


@pytest.mark.parametrize("offset", [0, 1, 299, 300, 301, 1023])
async def test_an_image_is_read_whole_from_any_offset(shelf: Shelf, offset: int) -> None:
    assert await shelf.read(offset) == DATA[offset:]


@pytest.mark.parametrize("offset", [0, 700, 1000])
async def test_an_image_that_was_cut_is_damaged_and_never_ends_early(shelf: Shelf, offset: int) -> None:
    shelf.file.write_bytes(DATA[:600])
    with pytest.raises(ImageDamagedError):
        await shelf.read(offset)


@pytest.mark.parametrize("offset", [0, 600])
@pytest.mark.parametrize("flipped", [0, 500, 1023])
async def test_one_altered_byte_is_told_before_the_last_piece(
    shelf: Shelf, offset: int, flipped: int, caplog: pytest.LogCaptureFixture
) -> None:
    altered = bytearray(DATA)
    altered[flipped] ^= 1
    shelf.file.write_bytes(altered)
    with caplog.at_level(logging.ERROR), pytest.raises(ImageDamagedError) as caught:
        await shelf.read(offset)
    assert (caught.value.job_id, caught.value.index) == (shelf.job.job_id, 0)
    assert "its SHA-256 is another" in caplog.text


async def test_an_image_that_is_gone_is_damaged_while_its_job_is_there(shelf: Shelf) -> None:
    shelf.file.unlink()
    with pytest.raises(ImageDamagedError):
        await shelf.read()


async def test_an_image_whose_job_was_deleted_meanwhile_is_not_found(shelf: Shelf) -> None:
    reader = shelf.reader()
    await reader.read(shelf.image, 0, PIECE_BYTES)
    await shelf.artifacts.remove(shelf.job.job_id)
    await shelf.store.delete(None, shelf.job.job_id)
    with pytest.raises(JobNotFoundError):
        await reader.read(shelf.image, PIECE_BYTES, PIECE_BYTES)
