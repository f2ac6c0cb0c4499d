"""What an artifact store in a bucket answers when its server fails or refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hidream_grpc.errors import (
    ArtifactUnavailableError,
    StorageFullError,
)
from hidream_grpc.jobs.artifacts.artifacts import MAX_CALLS_AT_ONCE, ArtifactStore, image_file
from hidream_grpc.jobs.artifacts.objects import ArtifactTimeouts
from tests.contract.artifacts import (
    CLAIM,
    DATA,
    PARAMETERS,
    TIMEOUT_SECONDS,
    image,
    listed,
)
from tests.support.answering_servers import answering
from tests.support.s3_server import BUCKET, S3Server

SHORT = ArtifactTimeouts(connect_seconds=0.2, request_seconds=0.3, call_seconds=0.6)


async def all_calls_are_unavailable(store: ArtifactStore) -> None:
    for call in (
        store.probe(),
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


@pytest.mark.parametrize(
    ("status", "code"), [(507, "XMinioStorageFull"), (403, "QuotaExceeded")], ids=["disks", "quota"]
)
async def test_a_bucket_without_room_is_told_as_a_full_disk_is(
    status: int, code: str, s3_location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, f"<Error><Code>{code}</Code></Error>") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = ArtifactStore(s3_location)
        with pytest.raises(StorageFullError):
            await store.write("job", CLAIM, 0, PARAMETERS, DATA)


async def test_a_bucket_whose_server_was_killed_is_unavailable_and_heals_with_it(
    s3_server: S3Server, s3_location: str
) -> None:
    store = ArtifactStore(s3_location)
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    s3_server.kill()
    try:
        await all_calls_are_unavailable(ArtifactStore(s3_location, SHORT))
    finally:
        s3_server.start()
    await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert await store.read("job", image(0), 0, len(DATA)) == DATA


async def test_a_bucket_that_does_not_answer_is_unavailable_in_time_for_any_number_of_calls(
    s3_server: S3Server, s3_location: str
) -> None:
    await ArtifactStore(s3_location).write("job", CLAIM, 0, PARAMETERS, DATA)
    store = ArtifactStore(s3_location, SHORT)
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
async def test_a_bucket_that_refuses_us_is_unavailable_and_the_operator_is_told_why(
    status: int, s3_location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, "<Error><Code>SomeReason</Code></Error>") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = ArtifactStore(s3_location)
        with pytest.raises(ArtifactUnavailableError) as refused:
            await store.write("job", CLAIM, 0, PARAMETERS, DATA)
    assert str(refused.value) == "the artifact store is not available"
    assert "SomeReason" in refused.value.reason


async def test_a_bucket_that_was_never_made_is_unavailable(s3_location: str) -> None:
    store = ArtifactStore(s3_location.replace(BUCKET, "never-made"))
    with pytest.raises(ArtifactUnavailableError):
        await store.write("job", CLAIM, 0, PARAMETERS, DATA)
