"""An image that does not arrive as it was announced, or is lost at the server, is an error and no file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hidream.downloads import part_path
from hidream.errors import BrokenImageError, DataLossError
from hidream.v1 import image_pb2
from hidream_grpc.errors import ImageDamagedError
from hidream_grpc.server.status import to_status
from tests.clients.breaking_server import (
    CHUNK_BYTES,
    FILE,
    JOB_ID,
    BreakingImageGen,
    Chunks,
    breaking_image_gen,
    serving,
)
from tests.clients.either_client import EitherClient
from tests.clients.test_hidream_command import hidream

LOST = to_status(ImageDamagedError(JOB_ID, 0))


def without_a_piece(chunks: Chunks) -> Chunks:
    return [*chunks[:2], *chunks[3:]]


def without_the_end(chunks: Chunks) -> Chunks:
    return chunks[:-1]


def without_anything(chunks: Chunks) -> Chunks:
    return []


def with_a_piece_twice(chunks: Chunks) -> Chunks:
    return [*chunks[:2], *chunks[1:]]


def with_another_byte(chunks: Chunks) -> Chunks:
    damaged = image_pb2.ImageChunk(
        image=chunks[1].image, offset=chunks[1].offset, data=b"?" + chunks[1].data[1:]
    )
    return [chunks[0], damaged, *chunks[2:]]


def with_more_than_announced(chunks: Chunks) -> Chunks:
    longer = image_pb2.ImageChunk(
        image=chunks[-1].image, offset=chunks[-1].offset, data=chunks[-1].data + b"!"
    )
    return [*chunks[:-1], longer]


def with_empty_pieces(chunks: Chunks) -> Chunks:
    return [chunks[0], *[image_pb2.ImageChunk(image=chunks[0].image, offset=CHUNK_BYTES)] * 3, *chunks[1:]]


def announced_anew(chunks: Chunks) -> Chunks:
    info = image_pb2.ImageInfo(size_bytes=CHUNK_BYTES * 2, sha256=chunks[0].image.sha256)
    return [chunks[0], image_pb2.ImageChunk(image=info, offset=CHUNK_BYTES, data=chunks[1].data)]


DAMAGES = [
    without_a_piece,
    without_the_end,
    without_anything,
    with_a_piece_twice,
    with_another_byte,
    with_more_than_announced,
    with_empty_pieces,
    announced_anew,
]


@pytest.fixture
def server() -> Iterator[tuple[BreakingImageGen, str]]:
    servicer = breaking_image_gen()
    with serving(servicer) as address:
        yield servicer, address


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def either(request: pytest.FixtureRequest, server: tuple[BreakingImageGen, str]) -> EitherClient:
    return EitherClient(bool(request.param), server[1])


@pytest.mark.parametrize("method", ["generate", "watch"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_image_that_does_not_arrive_as_announced_ends_the_stream(
    damage: Callable[[Chunks], Chunks],
    method: str,
    server: tuple[BreakingImageGen, str],
    either: EitherClient,
) -> None:
    server[0].damage = damage
    with pytest.raises(BrokenImageError) as broken:
        either.items(method, JOB_ID)
    assert broken.value.image_index == 0
    assert len(server[0].starts) == 1


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_an_image_that_is_not_downloaded_as_announced_gets_no_name(
    damage: Callable[[Chunks], Chunks],
    server: tuple[BreakingImageGen, str],
    either: EitherClient,
    tmp_path: Path,
) -> None:
    server[0].damage, path = damage, tmp_path / "a.png"
    with pytest.raises(BrokenImageError) as broken:
        either.download(path)
    assert broken.value.image_index == 0
    assert len(server[0].starts) == 1
    assert not path.exists()
    # What was right of it may be gone on from.
    server[0].damage = list
    either.download(path)
    assert path.read_bytes() == FILE


def test_of_a_download_that_brings_more_than_announced_no_byte_too_many_is_kept(
    server: tuple[BreakingImageGen, str], either: EitherClient, tmp_path: Path
) -> None:
    server[0].damage = with_more_than_announced
    with pytest.raises(BrokenImageError):
        either.download(tmp_path / "a.png")
    assert part_path(tmp_path / "a.png", JOB_ID, 0).stat().st_size < len(FILE)


@pytest.mark.parametrize("method", ["generate", "watch"])
def test_an_image_that_the_server_has_lost_is_not_asked_for_again(
    method: str, server: tuple[BreakingImageGen, str], either: EitherClient
) -> None:
    server[0].breaks, server[0].status = [8], LOST
    with pytest.raises(DataLossError) as lost:
        either.items(method, JOB_ID)
    assert (lost.value.job_id, lost.value.image_index) == (JOB_ID, 0)
    assert len(server[0].starts) == 1


@pytest.mark.parametrize("num_sent", [0, 1, len(breaking_image_gen().chunks())])
def test_nothing_is_kept_of_a_download_that_the_server_has_lost(
    num_sent: int, server: tuple[BreakingImageGen, str], either: EitherClient, tmp_path: Path
) -> None:
    server[0].breaks, server[0].status = [num_sent], LOST
    # The loss may be found behind the last piece.
    server[0].damage = lambda chunks: [*chunks, *chunks[-1:]]
    with pytest.raises(DataLossError):
        either.download(tmp_path / "a.png")
    assert server[0].starts == [0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a fox", "--quiet", "--out", "a.png"),
        ("watch", JOB_ID, "--quiet", "--out", "a.png"),
        ("download", JOB_ID, "--out", "a.png"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_command_tells_a_lost_image_in_one_line_and_leaves_no_file(
    arguments: tuple[str, ...], server: tuple[BreakingImageGen, str], tmp_path: Path
) -> None:
    server[0].breaks, server[0].status = [7], LOST
    result = hidream(server[1], *arguments, folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"hidream: {server[1]}: {LOST.message}\n"
    assert not list(tmp_path.iterdir())
