"""Where the images of a request go, and in which format."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast

from hidream.images import Image
from hidream.requests import OutputFormat
from hidream.v1 import image_pb2
from hidream.writing import followed, is_replaceable, own_descriptor

DEFAULT_NAME = "hidream_{seed}"
STDOUT = "-"
STDOUT_PATH = Path("/dev/stdout")


class ImageFileFormat(StrEnum):
    """File formats, by the name that a command line gives them."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def output_format(self) -> OutputFormat:
        """The name of the format in a request."""
        return cast(OutputFormat, self.name)

    @property
    def suffix(self) -> str:
        """The end of the names of such files, with its dot."""
        return f".{self.value}"


def format_of_suffix(suffix: str) -> ImageFileFormat | None:
    """Return the format of a file by the suffix of its name; None where it says none."""
    name = suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    return ImageFileFormat(name) if name in set(ImageFileFormat) else None


@dataclass(frozen=True, slots=True)
class OutputPattern:
    """Where each image of one request goes.

    Attributes:
        pattern: a file; `{seed}` and `{index}` in its name stand for those of each image. Without
            either, several images get their index behind the name.
    """

    pattern: Path

    @classmethod
    def from_option(cls, out: str | None, suffix: str) -> OutputPattern:
        """What `--out` means: stdout, a file, a pattern, a folder, or nothing for the working folder.

        Args:
            out: `-` for stdout, or a path; a folder when it is one or ends in a slash, and made in the second
                case.
            suffix: of the files, where `out` does not name them; with its dot.

        Raises:
            NotADirectoryError: the file's folder does not exist.
            OSError: the folder cannot be made.
        """
        if out is None:
            return cls(Path(DEFAULT_NAME + suffix))
        path = STDOUT_PATH if out == STDOUT else Path(out)
        if out.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            return cls(path / (DEFAULT_NAME + suffix))
        if not path.parent.is_dir():
            raise NotADirectoryError(f"{path.parent}: no such folder")
        return cls(path)

    @property
    def is_stream(self) -> bool:
        """Whether every image goes to one device or pipe, where none replaces another."""
        return not is_replaceable(followed(self.pattern))

    @property
    def is_stdout(self) -> bool:
        """Whether the images go to the stdout of this process."""
        return own_descriptor(followed(self.pattern)) == 1

    @property
    def is_named_pipe(self) -> bool:
        """Whether the images go to a named pipe, whose reader sees an end behind the first."""
        path = followed(self.pattern)
        return path.is_fifo() and own_descriptor(path) is None

    def path_of(self, image: Image | image_pb2.ImageInfo, num_images: int) -> Path:
        """Return where one image of several goes."""
        if self.is_stream:
            return self.pattern
        stem, suffix = self.pattern.stem, self.pattern.suffix
        if num_images > 1 and "{seed}" not in stem and "{index}" not in stem:
            stem += "_{index}"
        return self.pattern.with_name(_fill(stem + suffix, image.seed, image.index))

    def preview_path(self, seed: int) -> Path:
        """Return where the preview of the unfinished image 0 goes, beside the finished ones."""
        return self.pattern.with_name(f"{_fill(self.pattern.stem, seed, 0)}.preview.jpg")


def _fill(name: str, seed: int, index: int) -> str:
    return name.replace("{seed}", str(seed)).replace("{index}", str(index))
