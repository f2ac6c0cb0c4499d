"""A checkpoint that does not match its configuration is refused in one line, with the file and the reason."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.checkpoint.text_encoders import text_encoder_files
from hidream_grpc.model.loading import load_module
from hidream_grpc.model.pipeline import HiDreamModel
from tests.support.unfinished_downloads import leave_pointer, unlink_target

MODEL_FLAG = "-m/--model-path"
EXTRA_FLAG = "-e/--extra-model-path"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
WEIGHTS = (TRANSFORMER, VAE, *(f"{encoder}/model.safetensors" for encoder in ENCODERS))

Tensors = dict[str, Tensor]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(weights: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change({name: tensor.clone() for name, tensor in load_file(weights).items()})
    # The file may be mapped by a model that was loaded from it.
    weights.unlink()
    save_file(tensors, weights, {"format": "pt"})


def a_matrix(tensors: Tensors) -> str:
    return next(name for name in sorted(tensors) if tensors[name].dim() > 1 and "lm_head" not in name)


def refused(checkpoint: Path, extra_model_path: Path | None = None) -> str:
    with pytest.raises(ModelNotFoundError) as raised:
        describe_checkpoint(checkpoint, extra_model_path)
    line = str(raised.value)
    assert "\n" not in line
    return line


def beside(suffix: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    """A tensor beside a matrix of the model, whose name differs from it in the end."""
    return lambda tensors: tensors | {a_matrix(tensors).removesuffix("weight") + suffix: tensor}


def as_float8(tensors: Tensors) -> Tensors:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}


def as_integers(tensors: Tensors) -> Tensors:
    return tensors | {a_matrix(tensors): tensors[a_matrix(tensors)].to(torch.int8)}


ONE = torch.ones(1)
CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "scaled float8": (lambda t: beside("scale_weight", ONE)(as_float8(t)), "scale_weight: quantized weights"),
    "scaled float8, marked": (lambda t: as_float8(t) | {"scaled_fp8": ONE}, "scaled_fp8: quantized weights"),
    "scaled float8, newer": (beside("weight_scale", ONE), "weight_scale: quantized weights"),
    "scaled in blocks": (beside("weight_scale_inv", ONE), "weight_scale_inv: quantized weights"),
    "bitsandbytes, 8 bits": (beside("SCB", ONE), "SCB: quantized weights"),
    "bitsandbytes, 4 bits": (beside("weight.absmax", ONE), "absmax: quantized weights"),
    "bitsandbytes, its map": (beside("weight.quant_map", ONE), "quant_map: quantized weights"),
    "GPTQ": (
        lambda t: beside("qweight", ONE)({name: t[name] for name in t if name != a_matrix(t)}),
        "qweight: quantized weights",
    ),
    "AWQ": (beside("qzeros", ONE), "qzeros: quantized weights"),
    "LoRA of peft": (beside("lora_A.weight", ONE), "lora_A.weight: LoRA tensors; merge them"),
    "LoRA of diffusers": (beside("lora.up.weight", ONE), "lora.up.weight: LoRA tensors; merge them"),
    "LoRA of others": (beside("lora_up.weight", ONE), "lora_up.weight: LoRA tensors; merge them"),
    "integers": (as_integers, " is I8, not floating point"),
    "a tensor that nobody knows": (beside("mystery", ONE), "mystery: tensors that this model does not have"),
    "a tensor missing": (
        lambda t: {name: t[name] for name in t if name != a_matrix(t)},
        " in the weights",
    ),
    "another shape": (lambda t: t | {a_matrix(t): torch.ones(3, 2)}, " is 3×2, config.json says "),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=list(CHANGES))
def test_weights_that_are_not_those_of_the_model_are_one_line_saying_why(
    change: Callable[[Tensors], Tensors], reason: str, weights: str, own_checkpoint: Path
) -> None:
    rewrite(own_checkpoint / weights, change)
    line = refused(own_checkpoint)
    assert line.startswith(f"{MODEL_FLAG}: {(own_checkpoint / weights).parent}")
    assert reason in line


def test_a_line_names_the_worst_tensor_and_counts_the_others(own_checkpoint: Path) -> None:
    extra = {f"a.{index}.scale_weight": torch.ones(()) for index in range(3)} | {"a.bias": ONE}
    rewrite(own_checkpoint / TRANSFORMER, lambda tensors: tensors | extra)
    assert refused(own_checkpoint) == (
        f"{MODEL_FLAG}: {own_checkpoint / TRANSFORMER}: a.0.scale_weight and 3 more: quantized weights;"
        " take those that are not quantized"
    )


@pytest.mark.parametrize("component", ["transformer", "vae", *ENCODERS])
def test_a_quantized_component_is_one_line_naming_its_configuration(
    component: str, own_checkpoint: Path
) -> None:
    config = own_checkpoint / component / "config.json"
    edit(config, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert refused(own_checkpoint) == (
        f"{MODEL_FLAG}: {config}: quantization_config: the weights are quantized (bitsandbytes);"
        " take those that are not quantized"
    )


def test_what_is_wrong_with_the_llama_folder_names_its_flag(own_split_checkpoint: tuple[Path, Path]) -> None:
    checkpoint, llama = own_split_checkpoint
    rewrite(llama / "model.safetensors", beside("SCB", ONE))
    assert refused(checkpoint, llama).startswith(f"{EXTRA_FLAG}: {llama / 'model.safetensors'}: ")


@pytest.mark.parametrize("folder", ["text_encoder_4", "."])
@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_lora_weights.safetensors"])
def test_a_lora_in_a_folder_of_weights_is_not_passed_over(
    name: str, folder: str, own_checkpoint: Path
) -> None:
    (own_checkpoint / folder / name).write_text("{}")
    assert refused(own_checkpoint).endswith(f"{name}: a LoRA that is not loaded; merge it into the weights")


PUBLISHED: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "position ids of CLIP": (
        "text_encoder",
        lambda t: t | {"text_model.embeddings.position_ids": torch.arange(128)[None]},
    ),
    "CLIP with its half for images": (
        "text_encoder_2",
        lambda t: t | {"vision_model.post_layernorm.weight": ONE, "logit_scale": torch.ones(())},
    ),
    "T5 with its decoder": (
        "text_encoder_3",
        lambda t: t | {"decoder.final_layer_norm.weight": ONE, "lm_head.weight": torch.ones(2)},
    ),
    "T5 with its embeddings twice": (
        "text_encoder_3",
        lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"].clone()},
    ),
    "T5 with its embeddings by the other name": (
        "text_encoder_3",
        lambda t: {name.replace("shared", "encoder.embed_tokens"): tensor for name, tensor in t.items()},
    ),
    "Llama with a head, which its configuration ties to its embeddings": (
        "text_encoder_4",
        lambda t: t | {"lm_head.weight": torch.zeros(3, 3, dtype=torch.int8)},
    ),
    "Llama without its head": (
        "text_encoder_4",
        lambda t: {name: tensor for name, tensor in t.items() if name != "lm_head.weight"},
    ),
    "Llama as LlamaModel writes it": (
        "text_encoder_4",
        lambda t: {name.removeprefix("model."): t[name] for name in t if name != "lm_head.weight"},
    ),
    "Llama with the frequencies of its rotation": (
        "text_encoder_4",
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": ONE},
    ),
}

ENCODER_CLASSES: dict[str, type[nn.Module]] = {
    "text_encoder": transformers.CLIPTextModelWithProjection,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
    "text_encoder_3": transformers.T5EncoderModel,
    "text_encoder_4": transformers.LlamaModel,
}


def loaded_weights(encoder: str, checkpoint: Path) -> Tensors:
    """The weights that transformers loads from a text encoder's files."""
    module: nn.Module = load_module(ENCODER_CLASSES[encoder], checkpoint / encoder, CpuDevice())
    return module.state_dict()


def num_parameters(checkpoint: Path) -> dict[str, int]:
    files = text_encoder_files(checkpoint, None, 2)
    return {name: described.num_parameters for name, described in files.items()}


@pytest.mark.parametrize(("encoder", "change"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_what_comes_with_published_text_encoders_is_accepted_and_changes_nothing(
    encoder: str, change: Callable[[Tensors], Tensors], own_checkpoint: Path
) -> None:
    edit(own_checkpoint / "text_encoder_4" / "config.json", tie_word_embeddings=True)
    before, num_before = loaded_weights(encoder, own_checkpoint), num_parameters(own_checkpoint)
    rewrite(own_checkpoint / encoder / "model.safetensors", change)
    describe_checkpoint(own_checkpoint, None)
    after = loaded_weights(encoder, own_checkpoint)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The gate of memory, the placement of text encoders and GetServerInfo go by these numbers.
    assert num_parameters(own_checkpoint) == num_before


TWINS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another dtype": (lambda t: t.to(torch.int8), "encoder.embed_tokens.weight is I8, not floating point"),
    "another shape": (lambda t: t[:3, :3].clone(), "encoder.embed_tokens.weight is 3×3, config.json says "),
    "other numbers": (
        lambda t: t.index_fill(0, torch.tensor(len(t) - 1), 0.5),
        "encoder.embed_tokens.weight is not the same as shared.weight; remove one",
    ),
    "another precision": (
        lambda t: t.half(),
        "encoder.embed_tokens.weight is not the same as shared.weight; remove one",
    ),
}


@pytest.mark.parametrize(("change", "reason"), TWINS.values(), ids=list(TWINS))
def test_embeddings_of_t5_by_two_names_are_one_matrix_or_are_refused(
    change: Callable[[Tensor], Tensor], reason: str, own_checkpoint: Path
) -> None:
    weights = own_checkpoint / "text_encoder_3" / "model.safetensors"
    rewrite(weights, lambda t: t | {"encoder.embed_tokens.weight": change(t["shared.weight"])})
    assert refused(own_checkpoint).startswith(f"{MODEL_FLAG}: {weights}: {reason}")


def test_float8_without_scales_is_loaded_as_it_is_and_one_line_says_so(
    own_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for weights in WEIGHTS:
        rewrite(own_checkpoint / weights, as_float8)
    with caplog.at_level(logging.WARNING):
        describe_checkpoint(own_checkpoint, None)
    (line,) = [message for message in caplog.messages if str(own_checkpoint / "transformer") in message]
    assert line.endswith(" are F8_E4M3, without scales: taken as they are")
    HiDreamModel.from_pretrained(own_checkpoint, None, CpuDevice())
    for encoder in ENCODERS:
        loaded = loaded_weights(encoder, own_checkpoint)
        stored = load_file(own_checkpoint / encoder / "model.safetensors")
        for name in stored.keys() - {"lm_head.weight"}:
            weight = loaded[name.removeprefix("model.")]
            assert torch.equal(weight, stored[name].to(weight.dtype)), name


def test_a_refusal_after_weights_in_float8_is_one_line(
    own_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(own_checkpoint / VAE, as_float8)
    (own_checkpoint / "generation_config.json").write_text('{"width": 100}')
    assert refused(own_checkpoint).endswith("100×128 cannot be generated")
    assert caplog.messages == []


def test_left_over_indexes_change_neither_what_is_loaded_nor_what_it_is_called(
    own_checkpoint: Path,
) -> None:
    before = describe_checkpoint(own_checkpoint, None)
    for weights in WEIGHTS:
        path = own_checkpoint / weights
        for name in (f"{path.stem}.safetensors.index.json", f"{path.stem}.fp16.safetensors.index.json"):
            path.with_name(name).write_text('{"weight_map": {"a": "gone-00001-of-00002.safetensors"}}')
    assert describe_checkpoint(own_checkpoint, None) == before
    HiDreamModel.from_pretrained(own_checkpoint, None, CpuDevice(), fingerprint=before.fingerprint)


EDITING: dict[str, Callable[[Path], None]] = {
    "room for a source beside the picture": lambda folder: edit(
        folder / "transformer" / "config.json", max_resolution=[16, 32]
    ),
    "its name": lambda folder: edit(
        folder / "transformer" / "config.json", _name_or_path="HiDream-ai/HiDream-E1-Full"
    ),
    "its place in the hub's cache": lambda folder: into_cache(folder / TRANSFORMER, "HiDream-E1-Full"),
    "its pipeline": lambda folder: edit(
        folder / "model_index.json", _class_name="HiDreamImageEditingPipeline"
    ),
}


def into_cache(weights: Path, repository: str) -> None:
    blob = weights.parents[1] / f"models--HiDream-ai--{repository}" / "blobs" / "0123abcd"
    blob.parent.mkdir(parents=True)
    weights.rename(blob)
    weights.symlink_to(blob)


@pytest.mark.parametrize("make", EDITING.values(), ids=list(EDITING))
def test_weights_of_the_editing_model_are_refused_where_the_files_tell(
    make: Callable[[Path], None], own_checkpoint: Path
) -> None:
    make(own_checkpoint)
    assert "HiDream-E1 edits" in refused(own_checkpoint) or "HiDreamImageEditing" in refused(own_checkpoint)


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "generation_config.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        *WEIGHTS,
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer_3/tokenizer.json",
        "tokenizer_4/tokenizer_config.json",
    ],
)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [(leave_pointer, "a pointer of Git LFS"), (unlink_target, "a link to ../../blobs/0123abcd")],
    ids=["LFS", "dangling link"],
)
def test_a_file_that_was_not_downloaded_is_named_whatever_it_is(
    damage: Callable[[Path], None], reason: str, file: str, own_checkpoint: Path
) -> None:
    (own_checkpoint / "generation_config.json").write_text("{}")
    damage(own_checkpoint / file)
    assert refused(own_checkpoint).startswith(f"{MODEL_FLAG}: {own_checkpoint / file}: {reason}")


def test_a_checkpoint_in_the_hubs_cache_is_called_by_its_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--HiDream-ai--HiDream-I1-Dev"
    snapshot = repository / "snapshots" / ("0123456789abcdef" * 3)[:40]
    for number, path in enumerate(filter(Path.is_file, sorted(tiny_checkpoint.rglob("*")))):
        blob = repository / "blobs" / str(number)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(tiny_checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (tmp_path / "current").symlink_to(snapshot)
    assert describe_checkpoint(snapshot, None).name == "HiDream-I1-Dev"
    assert describe_checkpoint(tmp_path / "current", None).name == "HiDream-I1-Dev"
