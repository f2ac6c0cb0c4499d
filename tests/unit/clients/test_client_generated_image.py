from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hidream.commands import app
from hidream.files import ImageFileFormat
from hidream.generated_image import GeneratedImage
from hidream_grpc.model.decoding.images import encode_image
from hidream_grpc.model.image_metadata import ImageMetadata, MetadataDetail
from hidream_grpc.model.parameters import OutputFormat
from tests.support.denoising import parameters


def written(
    folder: Path, output_format: OutputFormat, detail: MetadataDetail = "full", prompt: str = "红 fox"
) -> Path:
    asked = parameters(prompt, output_format=output_format, quality=70, guidance_scale=3.3)
    metadata = ImageMetadata(detail=detail, model="demo", scheduler="Euler", shift=3.0)
    path = folder / f"fox.{output_format.name.lower()}"
    text = metadata.text(asked, 0, is_ascii=output_format is not OutputFormat.PNG)
    pixels = np.zeros((64, 64, 3), np.uint8)
    path.write_bytes(encode_image(pixels, output_format, 70, has_mark=metadata.has_mark, text=text))
    return path


@pytest.mark.parametrize("output_format", OutputFormat)
def test_show_prints_what_a_file_says(output_format: OutputFormat, tmp_path: Path) -> None:
    path = written(tmp_path, output_format)
    shown = CliRunner().invoke(app, ["show", str(path)])
    assert shown.exit_code == 0
    for fact in ("红 fox", "64×64, 4 steps, guidance 3.3, seed 7", "demo", "Euler, shift 3"):
        assert fact in shown.stdout
    said = json.loads(CliRunner().invoke(app, ["show", str(path), "--json"]).stdout)
    assert said["spec"]["prompt"] == "红 fox"
    assert said["is_generated"] is True
    image = GeneratedImage.read(str(path))
    assert image.file_format is ImageFileFormat[output_format.name]
    assert ("quality" in image.arguments(image.file_format)) is output_format.has_quality


def test_show_says_of_a_marked_file_that_a_model_generated_it_but_it_cannot_be_drawn_again(
    tmp_path: Path,
) -> None:
    path = str(written(tmp_path, OutputFormat.PNG, "mark"))
    assert "trainedAlgorithmicMedia" in CliRunner().invoke(app, ["show", path]).stdout
    again = CliRunner().invoke(app, ["generate", "--like", path])
    assert (again.exit_code, len(again.stderr.splitlines())) == (2, 1)
    assert "does not say from what" in again.stderr


def test_a_file_that_says_nothing_or_is_damaged_is_one_line(tmp_path: Path) -> None:
    silent = written(tmp_path, OutputFormat.JPEG, "none")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(written(tmp_path, OutputFormat.PNG).read_bytes().replace(b'"spec"', b'"SPEC"'))
    for path, reason in ((silent, "does not say how"), (damaged, "cannot be read")):
        shown = CliRunner().invoke(app, ["show", str(path)])
        assert (shown.exit_code, len(shown.stderr.splitlines())) == (2, 1)
        assert reason in shown.stderr


def test_a_prompt_of_somebody_else_does_not_steer_the_terminal(tmp_path: Path) -> None:
    path = written(tmp_path, OutputFormat.PNG, prompt="a \x1b[2J fox")
    assert "\x1b" not in CliRunner().invoke(app, ["show", str(path)]).stdout


def test_files_are_compared_by_bytes_and_by_pixels(tmp_path: Path) -> None:
    image = GeneratedImage.read(str(written(tmp_path, OutputFormat.PNG)))
    assert image.compared_with(image.data).startswith("the same bytes as")
    black, grey = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 2, np.uint8)
    for pixels, difference in (
        (black, "the pixels are the same"),
        (grey, "pixels differ by at most 2 of 255"),
        (black[:32], "another size"),
    ):
        assert image.compared_with(encode_image(pixels, OutputFormat.PNG, 90)).endswith(difference)
