"""What an artifact store keeps to in a folder alone."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hidream_grpc.errors import (
    ArtifactUnavailableError,
    ConfigurationError,
    StorageFullError,
)
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore, StoredFile
from tests.contract.artifacts import (
    CLAIM,
    DATA,
    ONE,
    PARAMETERS,
    TIMEOUT_SECONDS,
    acknowledged_before_a_kill,
    files_in,
    image,
    listed,
)
from tests.support.file_names import ODD_FILE_NAMES
from tests.support.small_disks import small_disk

WRITE_UNDER_A_LIMIT = """
import asyncio, resource, signal, sys
from hidream_grpc.errors import StorageFullError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from tests.contract.artifacts import CLAIM, PARAMETERS

async def write() -> None:
    store = ArtifactStore(sys.argv[1])
    await store.write("job", CLAIM, 0, PARAMETERS, bytes(4096))
    try:
        await store.write("job", CLAIM, 1, PARAMETERS, bytes(4097))
    except StorageFullError as error:
        assert (error.job_id, error.size_bytes) == ("job", 4097)
    else:
        raise AssertionError("the kernel let the file grow beyond its limit")

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
asyncio.run(write())
"""


async def test_images_of_before_claims_had_numbers_are_read_listed_and_removed(tmp_path: Path) -> None:
    (tmp_path / "images" / ONE).mkdir(parents=True)
    (tmp_path / "images" / ONE / "1").write_bytes(DATA)
    store = ArtifactStore(tmp_path)
    assert await store.read(ONE, image(1, claim_number=0), 9, 100) == DATA[9:109]
    assert await listed(store) == [StoredFile(f"images/{ONE}/1", ONE, 0, 1)]
    await store.remove_files(await listed(store))
    assert files_in(tmp_path) == []


async def test_what_a_killed_writer_left_in_a_folder_is_listed_and_removed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    await store.write(ONE, CLAIM, 0, PARAMETERS, DATA)
    (tmp_path / "images" / ONE / str(CLAIM) / "1#7").write_bytes(b"half of an image")
    staged = [file for file in await listed(store) if file.index is None]
    assert [(file.job_id, file.claim_number) for file in staged] == [(ONE, CLAIM)]
    await store.remove_files(staged)
    assert files_in(tmp_path) == [f"images/{ONE}/{CLAIM}/0"]


async def test_what_is_no_file_of_ours_is_passed_over(tmp_path: Path) -> None:
    for name in (
        "images/README",
        "images/a/b/c/d",
        "snapshots/lost+found",
        "elsewhere/job/1/0",
        "images/holiday/1.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"of somebody else")
    assert await listed(ArtifactStore(tmp_path)) == []


async def test_what_a_killed_writer_left_in_a_folder_goes_with_its_job(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    moment = random.Random(99)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not any("#" in name for name in files_in(tmp_path)):
            await acknowledged_before_a_kill(tmp_path.as_uri(), moment)
    await store.remove("job")
    assert files_in(tmp_path) == []


def test_an_image_that_has_no_room_is_refused_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    # In a process of its own: the kernel then refuses the write, as it does on a full disk.
    subprocess.run([sys.executable, "-c", WRITE_UNDER_A_LIMIT, tmp_path.as_uri()], check=True)
    assert files_in(tmp_path) == [f"images/job/{CLAIM}/0"]


async def test_a_full_disk_refuses_an_image_keeps_the_older_and_heals_when_there_is_room(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        store = ArtifactStore(disk)
        await store.write("old", CLAIM, 0, PARAMETERS, bytes(700_000))
        for job_id in ("new", "old"):
            with pytest.raises(StorageFullError):
                await store.write(job_id, CLAIM, 0, PARAMETERS, bytes([1]) * 700_000)
        with pytest.raises(StorageFullError) as refused:
            await store.write_snapshot("new", CLAIM, bytes(700_001))
        assert (refused.value.job_id, refused.value.size_bytes) == ("new", 700_001)
        assert files_in(disk) == [f"images/old/{CLAIM}/0"]
        assert await store.read("old", image(0), 0, 700_000) == bytes(700_000)
        await store.remove("old")
        await store.write("new", CLAIM, 0, PARAMETERS, bytes(700_000))
        assert files_in(disk) == [f"images/new/{CLAIM}/0"]


async def test_a_folder_that_cannot_be_written_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / "images").write_bytes(b"a file in the folder's place")
    with pytest.raises(ArtifactUnavailableError):
        await store.write("job", CLAIM, 0, PARAMETERS, DATA)


@pytest.mark.parametrize("name", ODD_FILE_NAMES, ids=ascii)
@pytest.mark.parametrize("as_location", [Path, Path.as_uri], ids=["path", "URL"])
async def test_a_folder_of_any_name_holds_the_images(
    name: str, as_location: Callable[[Path], Path | str], tmp_path: Path
) -> None:
    store = ArtifactStore(as_location(tmp_path / name))
    stored = await store.write(ONE, CLAIM, 0, PARAMETERS, DATA)
    assert await store.read(ONE, stored, 0, len(DATA)) == DATA
    assert files_in(tmp_path) == [f"{name}/images/{ONE}/{CLAIM}/0"]


def test_a_folder_that_cannot_be_made_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError) as refused:
        ArtifactStore((tmp_path / "file" / "folder").as_uri())
    assert str(tmp_path / "file" / "folder") in str(refused.value)
    assert "\n" not in str(refused.value)


async def test_a_folder_that_was_moved_away_is_not_made_anew(tmp_path: Path) -> None:
    folder, away = tmp_path / "artifacts", tmp_path / "away"
    store = ArtifactStore(folder)
    await store.write(ONE, CLAIM, 0, PARAMETERS, DATA)
    folder.rename(away)
    for attempt in (store.write(ONE, CLAIM, 1, PARAMETERS, DATA), store.set_store_id("other")):
        with pytest.raises(ArtifactUnavailableError):
            await attempt
    away.rename(folder)
    await store.write(ONE, CLAIM, 1, PARAMETERS, DATA)
    assert [file.index for file in await listed(store)] == [0, 1]
