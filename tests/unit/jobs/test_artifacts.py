from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat

PARAMETERS = GenerationParameters(
    prompt="a red circle",
    width=64,
    height=128,
    num_inference_steps=2,
    guidance_scale=5.0,
    num_images=3,
    seed=40,
    output_format=OutputFormat.WEBP,
)
DATA = bytes(range(256)) * 40


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


async def test_a_stored_image_says_what_it_is_and_is_read_from_any_offset(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "made" / "for it")
    image = await store.write("job", 2, PARAMETERS, DATA)
    assert (image.index, image.width, image.height, image.seed) == (2, 64, 128, 42)
    assert (image.mime_type, image.size_bytes) == ("image/webp", len(DATA))
    assert image.sha256 == hashlib.sha256(DATA).digest()
    assert await store.read("job", 2, 1000, 77) == DATA[1000:1077]
    assert await store.read("job", 2, len(DATA) - 5, 100) == DATA[-5:]


async def test_removing_a_job_removes_all_its_images_and_no_other_job(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for job_id in ("one", "other"):
        for index in range(2):
            await store.write(job_id, index, PARAMETERS, DATA)
    await store.remove("one")
    assert files_in(tmp_path) == ["other/0", "other/1"]
    with pytest.raises(FileNotFoundError):
        await store.read("one", 0, 0, 10)
    await store.remove("never there")


WRITE_UNDER_A_LIMIT = """
import asyncio, resource, signal, sys
from pathlib import Path
from hidream_grpc.errors import StorageFullError
from hidream_grpc.jobs.artifacts import ArtifactStore
from tests.unit.jobs.test_artifacts import PARAMETERS

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store = ArtifactStore(Path(sys.argv[1]))
asyncio.run(store.write("job", 0, PARAMETERS, bytes(4096)))
try:
    asyncio.run(store.write("job", 1, PARAMETERS, bytes(4097)))
except StorageFullError as error:
    assert (error.job_id, error.size_bytes) == ("job", 4097)
else:
    raise AssertionError("the kernel let the file grow beyond its limit")
"""


def test_an_image_that_has_no_room_is_refused_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    # In a process of its own: the kernel then refuses the write, as it does on a full disk.
    subprocess.run([sys.executable, "-c", WRITE_UNDER_A_LIMIT, tmp_path], check=True)
    assert files_in(tmp_path) == ["job/0"]


async def test_a_folder_that_cannot_be_written_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / "job").write_bytes(b"a file in the folder's place")
    with pytest.raises(OSError, match=r"[Ee]xists|Not a directory"):
        await store.write("job", 0, PARAMETERS, DATA)
