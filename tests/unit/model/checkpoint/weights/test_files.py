"""Which files hold the weights of a component, and what is read of them before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.weights.files import Library, num_weights, read_tensors, weight_files
from tests.support.unfinished_downloads import halve, leave_part, leave_pointer, unlink_target

FLAG = "-m/--model-path"
SINGLE = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def write_single(folder: Path, name: str = SINGLE) -> None:
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}, folder / name)


def write_index(folder: Path, stem: str = "diffusion_pytorch_model") -> None:
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_shards(folder: Path) -> None:
    save_file({"a": np.ones((2, 3), np.float32)}, folder / SHARDS[0])
    save_file({"b": np.ones(5, np.float16)}, folder / SHARDS[1])
    write_index(folder)


def names(folder: Path, library: Library = Library.DIFFUSERS) -> list[str]:
    return [path.name for path in weight_files(folder, library) if path.suffix == ".safetensors"]


def refused(folder: Path) -> str:
    with pytest.raises(ModelNotFoundError) as raised:
        read_tensors(folder, Library.DIFFUSERS)
    return str(raised.value)


@pytest.mark.parametrize("write", [write_single, write_shards], ids=["one file", "two files"])
def test_the_headers_tell_every_tensor_wherever_it_lies(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    tensors = read_tensors(tmp_path, Library.DIFFUSERS)
    assert {name: (t.dtype, t.shape, t.size_bytes) for name, t in tensors.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("F16", (5,), 10),
    }
    assert num_weights(tensors) == 11


@pytest.mark.parametrize("write", [write_single, write_shards], ids=["one file", "two files"])
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda folder: write_single(folder, SINGLE.replace("model.", "model.fp16.")), id="file"),
        pytest.param(lambda folder: write_index(folder, "diffusion_pytorch_model.fp16"), id="its index"),
        pytest.param(lambda folder: write_single(folder, "model.safetensors"), id="the other library's"),
    ],
)
def test_weights_in_another_precision_beside_whole_ones_are_left_alone(
    leave: Callable[[Path], None], write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path)
    before = weight_files(tmp_path, Library.DIFFUSERS)
    leave(tmp_path)
    assert weight_files(tmp_path, Library.DIFFUSERS) == before


def test_an_index_whose_files_are_gone_does_not_refuse_the_whole_file_beside_it(tmp_path: Path) -> None:
    write_single(tmp_path)
    write_index(tmp_path)
    assert names(tmp_path) == [SINGLE]


def test_of_one_file_and_a_whole_index_each_library_takes_what_it_takes_itself(tmp_path: Path) -> None:
    write_single(tmp_path)
    write_shards(tmp_path)
    assert names(tmp_path) == SHARDS
    write_single(tmp_path, "model.safetensors")
    write_index(tmp_path, "model")
    assert names(tmp_path, Library.TRANSFORMERS) == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert names(tmp_path, Library.TRANSFORMERS) == SHARDS


@pytest.mark.parametrize("file", [SINGLE, SHARDS[1]], ids=["one file", "one of two files"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(halve, "not a whole safetensors file: ", id="truncated"),
        pytest.param(
            leave_pointer, "a pointer of Git LFS, not the file itself: run `git lfs pull`", id="LFS"
        ),
        pytest.param(unlink_target, "a link to ../../blobs/0123abcd, which is not there", id="dangling link"),
        pytest.param(leave_part, "; a download into its folder has not finished", id="part"),
    ],
)
def test_a_download_that_is_not_whole_is_one_line_naming_the_file(
    damage: Callable[[Path], None], reason: str, file: str, tmp_path: Path
) -> None:
    write_single(tmp_path) if file == SINGLE else write_shards(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ModelNotFoundError) as raised:
        read_tensors(tmp_path, Library.DIFFUSERS)
    line = str(raised.value)
    assert file in line
    assert reason in line
    assert line.startswith(f"{FLAG}: {tmp_path}")
    assert "\n" not in line


def test_a_folder_with_another_variant_alone_says_what_it_holds(tmp_path: Path) -> None:
    write_single(tmp_path, "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ModelNotFoundError) as raised:
        weight_files(tmp_path, Library.DIFFUSERS)
    assert str(raised.value) == (
        f"{FLAG}: {tmp_path}: no weights: no {SINGLE}, but diffusion_pytorch_model.fp16.safetensors,"
        " which is not loaded"
    )


def test_shards_without_their_index_are_no_weights(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / f"{SINGLE}.index.json").unlink()
    with pytest.raises(ModelNotFoundError, match=f"no weights: no {SINGLE}, but {SHARDS[0]}"):
        weight_files(tmp_path, Library.DIFFUSERS)


def test_an_unfinished_download_of_another_file_does_not_refuse_whole_weights(tmp_path: Path) -> None:
    write_single(tmp_path)
    shutil.copy(tmp_path / SINGLE, tmp_path / "other.incomplete")
    assert names(tmp_path) == [SINGLE]


def test_a_tensor_in_two_files_is_refused_whichever_the_index_means(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.float16)}, tmp_path / SHARDS[1])
    assert refused(tmp_path) == f"{FLAG}: {tmp_path / SHARDS[1]}: holds a, which {SHARDS[0]} holds too"


def fold(folder: Path) -> None:
    (folder / SINGLE).mkdir()


def pipe(folder: Path) -> None:
    os.mkfifo(folder / SINGLE)


def link_to_itself(folder: Path) -> None:
    (folder / SINGLE).symlink_to(SINGLE)


def pickled(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        (fold, f"/{SINGLE}: a folder, not a file"),
        (pipe, f"/{SINGLE}: not a regular file"),
        (link_to_itself, f"/{SINGLE}: a link that leads to itself"),
        (
            pickled,
            f": no weights: no {SINGLE}, but diffusion_pytorch_model.bin, which is not read: "
            "convert it to safetensors",
        ),
    ],
)
def test_what_stands_in_the_place_of_weights_is_told(
    leave: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    leave(tmp_path)
    assert refused(tmp_path) == f"{FLAG}: {tmp_path}{reason}"
