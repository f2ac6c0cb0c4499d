"""What every artifact store keeps to; one suite, on a folder and on a real S3-speaking server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hidream_grpc.errors import (
    ConfigurationError,
    ImageNotFoundError,
)
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore, StoredFile, image_file
from hidream_grpc.jobs.job import StoredImage
from tests.contract.artifacts import (
    CLAIM,
    DATA,
    IMAGE_BYTES,
    NUM_IMAGES,
    ONE,
    OTHER,
    PARAMETERS,
    acknowledged_before_a_kill,
    image,
    listed,
)


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return (tmp_path / "made for it" / "ünd").as_uri()
    bucket: str = request.getfixturevalue("s3_location")
    return bucket


@pytest.fixture
def store(location: str) -> ArtifactStore:
    return ArtifactStore(location)


async def test_a_probe_leaves_nothing_behind(store: ArtifactStore) -> None:
    await store.probe()
    assert [key for keys in store._objects.keys("", 10) for key in keys] == []


async def test_a_stored_image_says_what_it_is(store: ArtifactStore) -> None:
    stored = await store.write("job", CLAIM, 2, PARAMETERS, DATA)
    assert (stored.index, stored.width, stored.height, stored.seed) == (2, 64, 128, 42)
    assert (stored.mime_type, stored.size_bytes, stored.claim_number) == ("image/webp", len(DATA), CLAIM)
    assert stored.sha256 == hashlib.sha256(DATA).digest()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, len(DATA)),
        (1000, 77),
        (len(DATA) - 5, 100),
        (len(DATA) - 1, 1),
        (len(DATA), 10),
        (len(DATA) + 9, 10),
        (9, 0),
    ],
)
async def test_any_range_of_an_image_can_be_read(store: ArtifactStore, offset: int, length: int) -> None:
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert await store.read("job", image(0), offset, length) == DATA[offset : offset + length]


async def test_an_image_that_is_not_there_is_named(store: ArtifactStore) -> None:
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    for job_id, index in (("job", 1), ("other", 0)):
        with pytest.raises(ImageNotFoundError) as missing:
            await store.read(job_id, image(index), 0, 10)
        assert (missing.value.job_id, missing.value.index) == (job_id, index)


async def test_an_image_that_is_written_again_is_the_newer_one(store: ArtifactStore) -> None:
    first = await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert await store.write("job", CLAIM, 0, PARAMETERS, DATA) == first
    await store.write("job", CLAIM, 0, PARAMETERS, b"shorter")
    assert await store.read("job", image(0), 0, len(DATA)) == b"shorter"


async def test_what_a_server_writes_late_overwrites_nothing_of_a_newer_claim(store: ArtifactStore) -> None:
    newer = await store.write("job", CLAIM + 1, 0, PARAMETERS, DATA)
    await store.write_snapshot("job", CLAIM + 1, b"newer")
    late = await store.write("job", CLAIM, 0, PARAMETERS, b"late")
    await store.write_snapshot("job", CLAIM, b"late")
    assert await store.read("job", newer, 0, len(DATA)) == DATA
    assert await store.read("job", late, 0, len(DATA)) == b"late"
    assert await store.read_snapshot("job", CLAIM + 1) == b"newer"
    await store.remove_snapshots("job")
    assert await store.read_snapshot("job", CLAIM) is None
    assert await store.read_snapshot("job", CLAIM + 1) is None
    await store.remove("job")
    assert await listed(store) == []


async def test_the_newest_snapshot_of_a_job_is_kept_apart_from_its_images(store: ArtifactStore) -> None:
    assert await store.read_snapshot("job", CLAIM) is None
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    for step in range(3):
        await store.write_snapshot("job", CLAIM, b"step %d" % step)
    assert await store.read_snapshot("job", CLAIM) == b"step 2"
    await store.remove_snapshots("job")
    await store.remove_snapshots("job")
    assert await store.read_snapshot("job", CLAIM) is None
    assert await store.read("job", image(0), 0, len(DATA)) == DATA


async def test_removing_a_job_removes_all_that_is_of_it_and_no_other_job(store: ArtifactStore) -> None:
    for job_id in ("one", "one-more", "other"):
        for index in range(2):
            await store.write(job_id, CLAIM, index, PARAMETERS, DATA)
        await store.write_snapshot(job_id, CLAIM, b"snapshot")
    for _ in range(2):
        await store.remove("one")
    await store.remove("never there")
    for index in range(2):
        with pytest.raises(ImageNotFoundError):
            await store.read("one", image(index), 0, 10)
    assert await store.read_snapshot("one", CLAIM) is None
    for job_id in ("one-more", "other"):
        assert await store.read(job_id, image(1), 0, len(DATA)) == DATA
        assert await store.read_snapshot(job_id, CLAIM) == b"snapshot"


async def test_a_second_server_on_the_same_store_has_the_same_images(
    store: ArtifactStore, location: str
) -> None:
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    other = ArtifactStore(location)
    assert await other.read("job", image(0), 0, len(DATA)) == DATA
    await other.remove("job")
    with pytest.raises(ImageNotFoundError):
        await store.read("job", image(0), 0, 1)


async def test_of_writers_at_the_same_time_one_wins_whole(store: ArtifactStore) -> None:
    versions = [bytes([version]) * 300_000 for version in range(8)]
    seen: set[bytes] = set()

    async def read_until(written: asyncio.Future[list[StoredImage]]) -> None:
        while not written.done():
            try:
                seen.add(await store.read("job", image(0), 0, 400_000))
            except ImageNotFoundError:
                continue

    written = asyncio.ensure_future(
        asyncio.gather(*(store.write("job", CLAIM, 0, PARAMETERS, version) for version in versions))
    )
    await asyncio.gather(written, read_until(written))
    seen.add(await store.read("job", image(0), 0, 400_000))
    assert seen <= set(versions)


@pytest.mark.parametrize("max_files", [1, 2, 1000])
async def test_all_files_are_listed_with_what_they_are(store: ArtifactStore, max_files: int) -> None:
    for job_id in (ONE, OTHER):
        for claim_number in (1, 20):
            await store.write(job_id, claim_number, 0, PARAMETERS, DATA)
        await store.write_snapshot(job_id, 20, b"snapshot")
    await store.set_store_id("a store")
    found = [files async for files in store.files(max_files)]
    assert all(len(files) <= max_files for files in found)
    files = sorted((file for files in found for file in files), key=lambda file: file.key)
    assert files == [
        *(image_file(job_id, claim, 0) for job_id in (ONE, OTHER) for claim in (1, 20)),
        *(StoredFile(f"snapshots/{job_id}/20", job_id, 20, None) for job_id in (ONE, OTHER)),
    ]


async def test_files_are_removed_one_by_one_and_one_that_is_gone_is_no_error(
    store: ArtifactStore,
) -> None:
    await store.write(ONE, 1, 0, PARAMETERS, DATA)
    kept = await store.write(ONE, 2, 0, PARAMETERS, DATA)
    await store.write_snapshot(ONE, 1, b"snapshot")
    gone = [file for file in await listed(store) if file.claim_number == 1]
    for _ in range(2):
        await store.remove_files([*gone, image_file(ONE, 7, 7)])
    assert await listed(store) == [image_file(ONE, 2, 0)]
    assert await store.read(ONE, kept, 0, len(DATA)) == DATA


async def test_the_files_belong_to_the_first_job_store_that_says_so(
    store: ArtifactStore, location: str
) -> None:
    assert await store.store_id() is None
    await asyncio.gather(*(store.set_store_id(store_id) for store_id in ("a", "b", "c", "a")))
    winner = await store.store_id()
    assert winner in ("a", "b", "c")
    await store.set_store_id("d")
    assert await ArtifactStore(location).store_id() == winner


@pytest.mark.parametrize("seed", range(6))
async def test_a_writer_that_is_killed_leaves_whole_images_and_all_that_it_acknowledged(
    store: ArtifactStore, location: str, seed: int
) -> None:
    num_acknowledged = await acknowledged_before_a_kill(location, random.Random(seed))
    for index in range(NUM_IMAGES):
        acknowledged = [number for number in range(num_acknowledged) if number % NUM_IMAGES == index]
        # Of the write that was killed nobody was told: it may be there, but then whole.
        possible = {number % 256 for number in (*acknowledged[-1:], num_acknowledged)}
        try:
            data = await store.read("job", image(index), 0, IMAGE_BYTES + 1)
        except ImageNotFoundError:
            assert not acknowledged
        else:
            assert data == data[:1] * IMAGE_BYTES
            assert data[0] in possible
    # A new writer is not in the way of what the killed one left.
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert await store.read("job", image(0), 0, IMAGE_BYTES) == DATA


@pytest.mark.parametrize(
    "location",
    ["images", "ftp://host/images", "file://host/images", "file:images", "s3:///prefix", "s3:bucket"],
)
def test_a_location_that_is_no_folder_and_no_bucket_is_told_at_the_start(location: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--artifacts: .*s3://BUCKET/PREFIX") as refused:
        ArtifactStore(location)
    assert repr(location) in str(refused.value)


@pytest.mark.parametrize(
    ("location", "line"),
    [
        ("file:///images?x", "'file:///images?x': in a URL '?' is written %3F"),
        ("file:///images#1", "'file:///images#1': in a URL '#' is written %23"),
        ("file:///images%", "'file:///images%': in a URL '%' is written %25"),
        ("file:///ima\nges", r"'file:///ima\nges': in a URL '\n' is written %0A"),
        ("file:///ima%00ges", "'file:///ima%00ges': a folder's name cannot hold %00"),
        ("s3://bucket/prefix?x", "'s3://bucket/prefix?x': in a URL '?' is written %3F"),
        ("s3://bucket/prefix ", "'s3://bucket/prefix ': in a URL ' ' is written %20"),
    ],
)
def test_what_a_url_would_lose_in_silence_is_refused(location: str, line: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        ArtifactStore(location)
    assert str(refused.value) == f"--artifacts: {line}"


def test_a_process_that_has_just_written_ends_in_order(location: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore\n"
        "asyncio.run(ArtifactStore(sys.argv[1]).write_snapshot('job', 1, b'step'))\n"
    )
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script, location], env=os.environ, capture_output=True)
        assert (ended.returncode, ended.stderr) == (0, b"")
