from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of, tokenizer_fingerprint_of
from tests.support.checkpoints import write_variant

Change = Callable[[Path], object]


def retrain(weights: Path) -> None:
    """Change every weight a little, in a file of the same size and header."""
    size_bytes = weights.stat().st_size
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    assert weights.stat().st_size == size_bytes


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_description_of_a_checkpoint_holds_its_fingerprint(tiny_checkpoint: Path) -> None:
    fingerprint = describe_checkpoint(tiny_checkpoint, None).fingerprint
    assert fingerprint == fingerprint_of(tiny_checkpoint, None)
    assert len(bytes.fromhex(fingerprint)) == 8


def test_a_copy_elsewhere_and_of_another_time_is_the_same_checkpoint(
    tiny_checkpoint: Path, own_checkpoint: Path
) -> None:
    for path in own_checkpoint.rglob("*"):
        os.utime(path, (1, 1))
    assert fingerprint_of(own_checkpoint, None) == fingerprint_of(tiny_checkpoint, None)


def test_links_to_the_files_are_the_same_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for path in filter(Path.is_file, tiny_checkpoint.rglob("*")):
        link = tmp_path / "linked" / path.relative_to(tiny_checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert fingerprint_of(tmp_path / "linked", None) == fingerprint_of(tiny_checkpoint, None)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: (folder / "README.md").write_text("red circles"), id="a README"),
        pytest.param(lambda folder: (folder / "vae" / "README.md").write_text("vae"), id="one further down"),
        pytest.param(lambda folder: (folder / ".git").mkdir(), id="a repository"),
        pytest.param(
            lambda folder: shutil.copy(
                folder / "vae" / "diffusion_pytorch_model.safetensors",
                folder / "vae" / "diffusion_pytorch_model.fp16.safetensors",
            ),
            id="weights in another precision",
        ),
    ],
)
def test_files_that_are_not_loaded_make_no_difference(
    change: Change, tiny_checkpoint: Path, own_checkpoint: Path
) -> None:
    change(own_checkpoint)
    assert fingerprint_of(own_checkpoint, None) == fingerprint_of(tiny_checkpoint, None)


@pytest.mark.parametrize(
    "weights",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "text_encoder_3/model.safetensors",
        "text_encoder_4/model.safetensors",
    ],
)
def test_retrained_weights_of_the_same_shapes_are_another_checkpoint(
    weights: str, tiny_checkpoint: Path, own_checkpoint: Path
) -> None:
    retrain(own_checkpoint / weights)
    assert fingerprint_of(own_checkpoint, None) != fingerprint_of(tiny_checkpoint, None)


def test_retrained_weights_of_a_large_file_are_another_checkpoint(tmp_path: Path) -> None:
    demo = Path(shutil.copytree(demo_checkpoint_path(), tmp_path / "demo"))
    assert fingerprint_of(demo, None) == fingerprint_of(demo_checkpoint_path(), None)
    retrain(demo / "transformer" / "diffusion_pytorch_model.safetensors")
    assert fingerprint_of(demo, None) != fingerprint_of(demo_checkpoint_path(), None)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda folder: edit(folder / "scheduler" / "scheduler_config.json", flow_shift=4.0), id="shift"
        ),
        pytest.param(
            lambda folder: edit(folder / "transformer" / "config.json", num_activated_experts=1), id="experts"
        ),
        pytest.param(lambda folder: edit(folder / "vae" / "config.json", scaling_factor=0.5), id="scaling"),
        pytest.param(
            lambda folder: edit(folder / "text_encoder_4" / "config.json", rope_theta=1), id="Llama"
        ),
        pytest.param(
            lambda folder: edit(folder / "tokenizer_3" / "tokenizer_config.json", model_max_length=32),
            id="tokenizer",
        ),
        pytest.param(lambda folder: (folder / "tokenizer" / "merges.txt").write_text(""), id="merges"),
        pytest.param(lambda folder: (folder / "generation_config.json").write_text("{}"), id="defaults"),
    ],
)
def test_another_number_in_a_configuration_is_another_checkpoint(
    change: Change, tiny_checkpoint: Path, own_checkpoint: Path
) -> None:
    change(own_checkpoint)
    assert fingerprint_of(own_checkpoint, None) != fingerprint_of(tiny_checkpoint, None)


def test_another_scheduler_on_the_same_weights_is_another_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    fast = write_variant(tiny_checkpoint, tmp_path / "fast", "fast")
    assert fingerprint_of(fast, None) != fingerprint_of(tiny_checkpoint, None)


def test_the_llama_folder_counts_where_the_checkpoint_holds_none(
    own_split_checkpoint: tuple[Path, Path],
) -> None:
    checkpoint, llama = own_split_checkpoint
    before = fingerprint_of(checkpoint, llama)
    retrain(llama / "model.safetensors")
    assert fingerprint_of(checkpoint, llama) != before


def test_the_llama_folder_counts_for_nothing_where_the_checkpoint_holds_its_own(
    tiny_checkpoint: Path, split_checkpoint: tuple[Path, Path]
) -> None:
    assert fingerprint_of(tiny_checkpoint, split_checkpoint[1]) == fingerprint_of(tiny_checkpoint, None)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n"], ids=["empty", "LFS"]
)
def test_a_weight_file_that_holds_no_weights_is_one_line_that_names_it(
    content: bytes, own_checkpoint: Path
) -> None:
    weights = own_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(content)
    with pytest.raises(ModelNotFoundError) as raised:
        fingerprint_of(own_checkpoint, None)
    assert str(raised.value) == f"-m/--model-path: {weights}: not a whole safetensors file"


def test_a_missing_weight_file_of_the_llama_folder_is_one_line_that_names_its_flag(
    own_split_checkpoint: tuple[Path, Path],
) -> None:
    checkpoint, llama = own_split_checkpoint
    (llama / "config.json").unlink()
    with pytest.raises(ModelNotFoundError) as raised:
        fingerprint_of(checkpoint, llama)
    assert str(raised.value) == f"-e/--extra-model-path: {llama / 'config.json'}: no such file"


def test_tokenizers_are_told_apart_by_what_they_are_and_not_by_the_weights_beside_them(
    own_checkpoint: Path,
) -> None:
    before = tokenizer_fingerprint_of(own_checkpoint, None)
    retrain(own_checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    assert tokenizer_fingerprint_of(own_checkpoint, None) == before
    edit(own_checkpoint / "tokenizer_3" / "tokenizer_config.json", model_max_length=17)
    assert tokenizer_fingerprint_of(own_checkpoint, None) != before
