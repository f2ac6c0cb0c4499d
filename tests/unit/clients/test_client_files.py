from dataclasses import replace
from pathlib import Path

import pytest

from hidream.files import ImageFileFormat, OutputPattern, format_of_suffix
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


def test_a_device_takes_every_image_and_its_name_gets_no_index() -> None:
    pattern = OutputPattern.from_option("/dev/null", ".png")
    assert (pattern.is_stream, pattern.is_stdout) == (True, False)
    assert pattern.path_of(IMAGE, num_images=4) == Path("/dev/null")


@pytest.mark.parametrize("out", ["-", "/dev/stdout", "/dev/fd/1"])
def test_stdout_has_several_names(out: str) -> None:
    assert OutputPattern.from_option(out, ".png").is_stdout


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
