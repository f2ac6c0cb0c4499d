"""What every artifact store keeps to; one suite, on a folder and on a real S3-speaking server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hidream_grpc.errors import (
    ArtifactUnavailableError,
    ConfigurationError,
    ImageNotFoundError,
    StorageFullError,
)
from hidream_grpc.jobs.artifacts.artifacts import MAX_CALLS_AT_ONCE, ArtifactStore, StoredFile, image_file
from hidream_grpc.jobs.artifacts.objects import ArtifactTimeouts
from hidream_grpc.jobs.job import StoredImage
from hidream_grpc.model.parameters import GenerationParameters, OutputFormat
from tests.support.answering_servers import answering
from tests.support.file_names import ODD_FILE_NAMES
from tests.support.s3_server import BUCKET, S3Server, running_s3_server
from tests.support.small_disks import small_disk

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
SHORT = ArtifactTimeouts(connect_seconds=0.2, request_seconds=0.3, call_seconds=0.6)
TIMEOUT_SECONDS = 60
ONE, OTHER = "1" * 32, "2" * 32
CLAIM = 3


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with running_s3_server() as server:
        yield server


@pytest.fixture
def s3_location(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/of a test"


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return (tmp_path / "made for it" / "ünd").as_uri()
    bucket: str = request.getfixturevalue("s3_location")
    return bucket


@pytest.fixture
def store(location: str) -> ArtifactStore:
    return ArtifactStore(location)


def image(index: int, claim_number: int = CLAIM) -> StoredImage:
    """What is read: of an image that may not be there."""
    return StoredImage(index, 64, 128, 40 + index, "image/webp", len(DATA), b"", claim_number=claim_number)


async def listed(store: ArtifactStore, max_files: int = 1000) -> list[StoredFile]:
    return [file async for files in store.files(max_files) for file in files]


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


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


async def test_images_of_before_claims_had_numbers_are_read_listed_and_removed(tmp_path: Path) -> None:
    (tmp_path / "images" / ONE).mkdir(parents=True)
    (tmp_path / "images" / ONE / "1").write_bytes(DATA)
    store = ArtifactStore(tmp_path)
    assert await store.read(ONE, image(1, claim_number=0), 9, 100) == DATA[9:109]
    assert await listed(store) == [StoredFile(f"images/{ONE}/1", ONE, 0, 1)]
    await store.remove_files(await listed(store))
    assert files_in(tmp_path) == []


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


# --- files of no job ----------------------------------------------------------------------------------


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


async def test_the_files_belong_to_the_first_job_store_that_says_so(
    store: ArtifactStore, location: str
) -> None:
    assert await store.store_id() is None
    await asyncio.gather(*(store.set_store_id(store_id) for store_id in ("a", "b", "c", "a")))
    winner = await store.store_id()
    assert winner in ("a", "b", "c")
    await store.set_store_id("d")
    assert await ArtifactStore(location).store_id() == winner


# --- killed writers ---------------------------------------------------------------------------------

NUM_IMAGES = 3
IMAGE_BYTES = 4_000_000

WRITE_UNTIL_KILLED = """
import asyncio, itertools, sys
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from tests.contract.test_artifact_store import CLAIM, IMAGE_BYTES, NUM_IMAGES, PARAMETERS

async def write() -> None:
    store = ArtifactStore(sys.argv[1])
    for number in itertools.count():
        data = bytes([number % 256]) * IMAGE_BYTES
        await store.write("job", CLAIM, number % NUM_IMAGES, PARAMETERS, data)
        print(number, flush=True)

asyncio.run(write())
"""


async def acknowledged_before_a_kill(location: str, moment: random.Random) -> int:
    """Run a writer, kill it at a random moment, and return how many writes it had acknowledged."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITE_UNTIL_KILLED, location, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        lines = [await child.stdout.readline() for _ in range(moment.randrange(1, 5))]
        assert b"" not in lines
        # The moment of the kill, not a wait for something to happen.
        await asyncio.sleep(moment.uniform(0, 0.03))
    finally:
        child.kill()
        rest = await child.stdout.read()
        await child.wait()
    return int([*lines, *rest.splitlines()][-1]) + 1


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


async def test_what_a_killed_writer_left_in_a_folder_goes_with_its_job(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    moment = random.Random(99)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not any("#" in name for name in files_in(tmp_path)):
            await acknowledged_before_a_kill(tmp_path.as_uri(), moment)
    await store.remove("job")
    assert files_in(tmp_path) == []


# --- no room ----------------------------------------------------------------------------------------

WRITE_UNDER_A_LIMIT = """
import asyncio, resource, signal, sys
from hidream_grpc.errors import StorageFullError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from tests.contract.test_artifact_store import CLAIM, PARAMETERS

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


@pytest.mark.parametrize(
    ("status", "code"), [(507, "XMinioStorageFull"), (403, "QuotaExceeded")], ids=["disks", "quota"]
)
async def test_a_bucket_without_room_is_told_as_a_full_disk_is(
    status: int, code: str, s3_location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, f"<Error><Code>{code}</Code></Error>") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = ArtifactStore(s3_location, ArtifactTimeouts(request_seconds=0.5))
        with pytest.raises(StorageFullError):
            await store.write("job", CLAIM, 0, PARAMETERS, DATA)


# --- a store that is gone ---------------------------------------------------------------------------


async def all_calls_are_unavailable(store: ArtifactStore) -> None:
    for call in (
        store.write("job", CLAIM, 0, PARAMETERS, DATA),
        store.read("job", image(0), 0, 10),
        store.write_snapshot("job", CLAIM, b"step"),
        store.read_snapshot("job", CLAIM),
        store.remove_snapshots("job"),
        store.remove("job"),
        store.store_id(),
        store.set_store_id("a store"),
        listed(store),
        store.remove_files([image_file("job", CLAIM, 0)]),
    ):
        with pytest.raises(ArtifactUnavailableError) as unavailable:
            await call
        assert unavailable.value.retry_after_seconds > 0


async def test_a_bucket_whose_server_was_killed_is_unavailable_and_heals_with_it(
    s3_server: S3Server, s3_location: str
) -> None:
    store = ArtifactStore(s3_location, SHORT)
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    s3_server.kill()
    try:
        await all_calls_are_unavailable(store)
    finally:
        s3_server.start()
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert await store.read("job", image(0), 0, len(DATA)) == DATA


async def test_a_bucket_that_does_not_answer_is_unavailable_in_time_for_any_number_of_calls(
    s3_server: S3Server, s3_location: str
) -> None:
    store = ArtifactStore(s3_location, SHORT)
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    s3_server.freeze()
    try:
        calls = [store.read("job", image(0), 0, 10) for _ in range(3 * MAX_CALLS_AT_ONCE)]
        async with asyncio.timeout(20 * SHORT.call_seconds):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        s3_server.thaw()
    assert {type(outcome) for outcome in outcomes} == {ArtifactUnavailableError}
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            try:
                assert await store.read("job", image(0), 0, len(DATA)) == DATA
                break
            except ArtifactUnavailableError:
                # It works off what it was asked while it was frozen.
                continue


async def test_the_event_loop_goes_on_while_a_bucket_does_not_answer(
    s3_server: S3Server, s3_location: str, tmp_path: Path
) -> None:
    bucket, folder = ArtifactStore(s3_location), ArtifactStore(tmp_path)
    s3_server.freeze()
    try:
        slow = asyncio.create_task(bucket.write("job", CLAIM, 0, PARAMETERS, DATA))
        for index in range(20):
            await folder.write("job", CLAIM, index, PARAMETERS, DATA)
        assert not slow.done()
    finally:
        s3_server.thaw()
    assert (await slow).size_bytes == len(DATA)


@pytest.mark.parametrize("status", [403, 500, 503])
async def test_a_bucket_that_refuses_us_is_unavailable_and_the_log_says_why(
    status: int, s3_location: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with answering(status, "<Error><Code>SomeReason</Code></Error>") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = ArtifactStore(s3_location, ArtifactTimeouts(request_seconds=0.5))
        with pytest.raises(ArtifactUnavailableError, match=r"^the artifact store is not available$"):
            await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert "SomeReason" in caplog.text


async def test_a_bucket_that_was_never_made_is_unavailable(s3_location: str) -> None:
    store = ArtifactStore(s3_location.replace(BUCKET, "never-made"))
    with pytest.raises(ArtifactUnavailableError):
        await store.write("job", CLAIM, 0, PARAMETERS, DATA)


async def test_a_folder_that_cannot_be_written_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / "images").write_bytes(b"a file in the folder's place")
    with pytest.raises(ArtifactUnavailableError):
        await store.write("job", CLAIM, 0, PARAMETERS, DATA)


# --- where it is ------------------------------------------------------------------------------------


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


def test_a_process_that_has_just_written_ends_in_order(location: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore\n"
        "asyncio.run(ArtifactStore(sys.argv[1]).write_snapshot('job', 1, b'step'))\n"
    )
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", script, location], env=os.environ, capture_output=True)
        assert (ended.returncode, ended.stderr) == (0, b"")


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
