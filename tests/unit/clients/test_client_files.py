from dataclasses import replace
from pathlib import Path

import pytest

from hidream.files import ImageFileFormat, OutputPattern, format_of_suffix, write_atomically
from hidream.images import Image

IMAGE = Image(index=1, width=64, height=64, seed=43, mime_type="image/png", sha256=b"", data=b"")


@pytest.mark.parametrize(
    ("out", "num_images", "name"),
    [
        pytest.param(None, 1, "hidream_43.png", id="nothing"),
        pytest.param(None, 2, "hidream_43.png", id="nothing, several images"),
        pytest.param("fox.png", 1, "fox.png", id="a file"),
        pytest.param("fox.png", 2, "fox_1.png", id="a file, several images"),
        pytest.param("fox", 2, "fox_1", id="a file without a suffix"),
        pytest.param("{index}-{seed}.png", 2, "1-43.png", id="a pattern"),
        pytest.param("{other}.png", 1, "{other}.png", id="braces that mean nothing"),
        pytest.param("made/", 1, "made/hidream_43.png", id="a folder that is made"),
    ],
)
def test_each_image_has_its_file(
    out: str | None, num_images: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pattern = OutputPattern.from_option(out, ".png")
    assert pattern.path_of(IMAGE, num_images) == Path(name)
    assert pattern.path_of(IMAGE, num_images).parent.is_dir()


def test_a_folder_that_exists_takes_the_images(tmp_path: Path) -> None:
    assert OutputPattern.from_option(str(tmp_path), ".webp").path_of(IMAGE, 1) == tmp_path / "hidream_43.webp"


def test_a_folder_that_does_not_exist_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="missing: no such folder"):
        OutputPattern.from_option(str(tmp_path / "missing" / "fox.png"), ".png")


def test_several_images_never_share_a_file(tmp_path: Path) -> None:
    for out in (None, "fox.png", "{seed}.png", "{index}.png", f"{tmp_path}/"):
        pattern = OutputPattern.from_option(out, ".png")
        pictures = [replace(IMAGE, index=index, seed=42 + index) for index in range(4)]
        assert len({pattern.path_of(picture, 4) for picture in pictures}) == 4


def test_the_preview_lies_beside_the_image() -> None:
    assert OutputPattern(Path("a/fox.png")).preview_path(42) == Path("a/fox.preview.jpg")
    assert OutputPattern(Path("a/{seed}.png")).preview_path(42) == Path("a/42.preview.jpg")


def test_a_file_replaces_the_older_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"older")
    write_atomically(path, b"newer")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"picture.png": b"newer"}


def test_a_write_that_fails_leaves_the_older_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.mkdir()
    with pytest.raises(OSError, match="picture"):
        write_atomically(path, b"newer")
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    ("suffix", "file_format"),
    [
        (".png", ImageFileFormat.PNG),
        (".jpg", ImageFileFormat.JPEG),
        (".JPEG", ImageFileFormat.JPEG),
        (".webp", ImageFileFormat.WEBP),
        (".gif", None),
        ("", None),
    ],
)
def test_a_suffix_tells_the_format(suffix: str, file_format: ImageFileFormat | None) -> None:
    assert format_of_suffix(suffix) is file_format
