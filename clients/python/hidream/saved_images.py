"""Writing the images of a command while its job is followed."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from hidream.events import Event, ImageFinished, Preview, Started
from hidream.files import STDOUT, ImageFileFormat, OutputPattern, format_of_suffix
from hidream.writing import write_file


class SavedImages:
    """Writes the images of one job as they are finished."""

    def __init__(self, pattern: OutputPattern, num_images: int = 1, seed: int = 0) -> None:
        """Write nothing yet.

        Args:
            pattern: where the images go.
            num_images: how many there will be; `Started` brings it where it is not known before.
            seed: of the first image, likewise.
        """
        self._pattern = pattern
        self._num_images = num_images
        self._seed = seed
        self._paths: dict[int, Path] = {}

    @property
    def paths(self) -> list[Path]:
        """The files in the order of their images' index; none where stdout carries the image itself."""
        if self._pattern.is_stdout:
            return []
        # Images are finished in any order.
        return [self._paths[index] for index in sorted(self._paths)]

    def take(self, event: Event) -> Path | None:
        """Take the next event, and return the file of an image that it finished."""
        match event:
            case Started():
                self._seed, self._num_images = event.spec.seed, event.spec.num_images
            case Preview() if not self._pattern.is_stream:
                write_file(self._pattern.preview_path(self._seed), event.data)
            case ImageFinished():
                path = self._pattern.path_of(event.image, self._num_images)
                write_file(path, event.image.data)
                self._paths[event.image.index] = path
                return path
        return None


def picked_format(out: str | None, file_format: ImageFileFormat | None) -> ImageFileFormat:
    """The format that `--out` and `--format` agree on; BadParameter where they do not."""
    if out in (None, STDOUT) or out.endswith("/") or Path(out).is_dir() or not Path(out).suffix:
        return file_format or ImageFileFormat.PNG
    named = format_of_suffix(Path(out).suffix)
    if named is None and file_format is None:
        known = ", ".join(ImageFileFormat)
        raise typer.BadParameter(f"{out!r} names none of {known}; say --format", param_hint="--out")
    if named and file_format and named is not file_format:
        raise typer.BadParameter(f"{out!r} is no name of a {file_format} file", param_hint="--out")
    return named or file_format or ImageFileFormat.PNG


def output_pattern(
    out: str | None, file_format: ImageFileFormat, num_images: int | None, as_json: bool
) -> OutputPattern:
    """What `--out` means; BadParameter where its folder does not exist, or stdout cannot take the images.

    Args:
        out: of the option.
        file_format: of the images.
        num_images: how many there will be, where that is known.
        as_json: whether stdout is for JSON.
    """
    try:
        pattern = OutputPattern.from_option(out, file_format.suffix)
    except NotADirectoryError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    if pattern.is_stdout and (num_images or 1) > 1:
        raise typer.BadParameter("stdout takes one image only", param_hint="--out")
    if pattern.is_named_pipe and (num_images or 1) > 1:
        raise typer.BadParameter("a named pipe takes one image only", param_hint="--out")
    if pattern.is_stdout and as_json:
        raise typer.BadParameter("stdout is for the JSON", param_hint="--out")
    if pattern.is_stdout and sys.stdout.isatty():
        raise typer.BadParameter("stdout is a terminal, which shows no images", param_hint="--out")
    return pattern
