import hashlib
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream.errors import BrokenImageError
from hidream.images import Image, ImageAssembler
from hidream.v1 import image_pb2

FILE = b"the bytes of one file"


def info_of(file: bytes, index: int = 0) -> image_pb2.ImageInfo:
    return image_pb2.ImageInfo(
        index=index,
        width=64,
        height=32,
        seed=7 + index,
        mime_type="image/png",
        size_bytes=len(file),
        sha256=hashlib.sha256(file).digest(),
    )


def chunk(info: image_pb2.ImageInfo, offset: int, data: bytes) -> image_pb2.ImageChunk:
    return image_pb2.ImageChunk(image=info, offset=offset, data=data)


@given(file=st.binary(min_size=1, max_size=200), cuts=st.sets(st.integers(1, 199)))
def test_an_image_in_any_pieces_becomes_its_file(file: bytes, cuts: set[int]) -> None:
    info, assembler = info_of(file), ImageAssembler()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(file)), len(file)]
    results = [assembler.add(chunk(info, start, file[start:end])) for start, end in pairwise(bounds)]
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1] == Image(
        index=0, width=64, height=32, seed=7, mime_type="image/png", sha256=info.sha256, data=file
    )


def test_pieces_of_several_images_may_mix() -> None:
    other = FILE[::-1]
    first, second, assembler = info_of(FILE), info_of(other, index=1), ImageAssembler()
    assert assembler.add(chunk(first, 0, FILE[:5])) is None
    assert assembler.add(chunk(second, 0, other[:9])) is None
    finished = assembler.add(chunk(first, 5, FILE[5:]))
    assert finished is not None
    assert finished.data == FILE
    assert assembler.num_finished == 1
    finished = assembler.add(chunk(second, 9, other[9:]))
    assert finished is not None
    assert (finished.index, finished.seed, finished.data) == (1, 8, other)


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        pytest.param([(0, FILE[:5]), (6, FILE[6:])], "at byte 6 after byte 5", id="a gap"),
        pytest.param([(0, FILE[:5]), (0, FILE[:5])], "at byte 0 after byte 5", id="a piece twice"),
        pytest.param([(0, FILE + b"!")], "more than its 21 bytes", id="more than announced"),
        pytest.param([(0, FILE[::-1])], "another SHA-256", id="other bytes"),
        pytest.param([(0, FILE), (len(FILE), b"")], "after the last one", id="a piece after the last"),
        pytest.param([(0, FILE[:5]), (5, b"")], "an empty piece at byte 5", id="an empty piece"),
    ],
)
def test_what_is_not_as_announced_is_refused(pieces: list[tuple[int, bytes]], reason: str) -> None:
    info, assembler = info_of(FILE), ImageAssembler()
    *first, last = pieces
    for offset, data in first:
        assembler.add(chunk(info, offset, data))
    with pytest.raises(BrokenImageError, match=reason) as broken:
        assembler.add(chunk(info, *last))
    assert broken.value.image_index == 0


def test_pieces_of_one_image_do_not_announce_two() -> None:
    assembler = ImageAssembler()
    assembler.add(chunk(info_of(FILE), 0, FILE[:5]))
    with pytest.raises(BrokenImageError, match="a piece of another image"):
        assembler.add(chunk(info_of(FILE[:9]), 5, FILE[5:9]))


IMAGE = Image(index=1, width=64, height=32, seed=8, mime_type="image/png", sha256=b"7" * 32, data=FILE * 9999)


def test_an_image_is_one_short_line_however_large_it_is() -> None:
    assert repr(IMAGE) == "Image(index=1, 64×32, seed=8, image/png, 209,979 bytes)"


def test_an_image_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(IMAGE)) == IMAGE


def test_an_image_saves_itself_under_any_kind_of_path(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "path.png")
    IMAGE.save(str(tmp_path / "text.png"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "path.png": IMAGE.data,
        "text.png": IMAGE.data,
    }


@pytest.mark.parametrize("mime_type", ["image/png", "image/jpeg", "image/webp"])
def test_a_notebook_shows_an_image_in_one_way(mime_type: str) -> None:
    image = replace(IMAGE, mime_type=mime_type, data=FILE)
    shown = {
        "image/png": image._repr_png_(),
        "image/jpeg": image._repr_jpeg_(),
        "image/webp": image._repr_html_(),
    }
    found = shown.pop(mime_type)
    assert found == FILE or "base64,dGhlIGJ5dGVzIG9mIG9uZSBmaWxl" in str(found)
    assert set(shown.values()) == {None}
