"""Checks weights against their configuration, by the headers of their files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.configs import CheckpointConfigs
from hidream_grpc.model.checkpoint.files import LLAMA, MODEL_PATH_FLAG, read_json
from hidream_grpc.model.checkpoint.weights.components import Component, components
from hidream_grpc.model.checkpoint.weights.files import StoredTensor, have_equal_data, read_tensors
from hidream_grpc.model.checkpoint.weights.text_encoders import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.checkpoint.weights.transformer import Shapes, transformer_tensors
from hidream_grpc.model.checkpoint.weights.vae import vae_tensors

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_DTYPES = ("F64", "F32", "F16", "BF16", *_FLOAT8)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# Why a tensor that is not read must not be ignored, by a part of its name.
_UNREAD_KINDS = (
    (re.compile("lora", re.IGNORECASE), "LoRA tensors; merge them into the weights"),
    (
        re.compile(r"scale|absmax|quant|qweight|qzeros|zero_point|g_idx|weight_format|\.SCB$"),
        "quantized weights; take those that are not quantized",
    ),
    (re.compile(""), "tensors that this model does not have"),
)


@dataclass(frozen=True, slots=True)
class _Contents:
    """The tensors that a component's files must or may hold, by its configuration.

    Attributes:
        shapes: shapes of the tensors that are read, once for each way to name them.
        unread: names of other tensors that may exist: buffers, and parts of a larger model.
        twins: pairs of names of one tensor, of which the library reads either.
    """

    shapes: tuple[Shapes, ...]
    unread: re.Pattern[str] | None = None
    twins: tuple[str, str] | None = None


_UNREAD_OF_CLIP = re.compile(
    r"text_model\.embeddings\.position_ids|vision_model\..+|visual_projection\.weight|logit_scale"
)
_UNREAD_OF_T5 = re.compile(r"lm_head\.weight|decoder\..+")
_UNREAD_OF_LLAMA = re.compile(r"lm_head\.weight|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


def check_weights(model_path: Path, extra_model_path: Path | None, configs: CheckpointConfigs) -> list[str]:
    """Check that all tensors that are read exist in a dtype to compute with, and that there are no others.

    Returns:
        Lines for the operator about weights that can be loaded, at most one for each component.

    Raises:
        ModelNotFoundError: a file is missing, is incomplete, or holds other tensors.
    """
    _check_no_adapter(model_path, MODEL_PATH_FLAG)
    contents = _contents(configs)
    warnings = []
    for component in components(model_path, extra_model_path):
        tensors = _check_component(component, contents[component.name])
        if float8 := {tensor.dtype for tensor in tensors.values()}.intersection(_FLOAT8):
            kinds = " and ".join(sorted(float8))
            warnings.append(
                f"the weights in {component.folder} are {kinds}, without scales: taken as they are"
            )
    return warnings


def _contents(configs: CheckpointConfigs) -> dict[str, _Contents]:
    """The tensors of each component."""
    t5, llama = t5_tensors(configs.t5), llama_tensors(configs.llama)
    own_name, other_name = _T5_EMBEDDINGS
    t5_by_other_name = {name.replace(own_name, other_name): shape for name, shape in t5.items()}
    return {
        "transformer": _Contents((transformer_tensors(configs.transformer),)),
        "vae": _Contents((vae_tensors(configs.vae),)),
        "text_encoder": _Contents((clip_tensors(configs.clip_l),), _UNREAD_OF_CLIP),
        "text_encoder_2": _Contents((clip_tensors(configs.clip_g),), _UNREAD_OF_CLIP),
        "text_encoder_3": _Contents(
            (t5, t5_by_other_name, t5 | t5_by_other_name), _UNREAD_OF_T5, _T5_EMBEDDINGS
        ),
        # The first is written by LlamaForCausalLM, the second by LlamaModel.
        LLAMA: _Contents(
            (llama, {name.removeprefix("model."): shape for name, shape in llama.items()}), _UNREAD_OF_LLAMA
        ),
    }


def _check_no_adapter(folder: Path, flag: str) -> None:
    for name in _ADAPTER_FILES:
        if os.path.lexists(folder / name):
            raise ModelNotFoundError(
                flag, folder / name, "a LoRA that is not loaded; merge it into the weights"
            )


def _check_component(component: Component, contents: _Contents) -> dict[str, StoredTensor]:
    folder, flag = component.folder, component.flag
    config = folder / "config.json"
    settings: dict[str, Any] = read_json(config, dict[str, Any], flag)
    if quantization := settings.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        reason = f"quantization_config: the weights are quantized ({method or 'unknown method'})"
        raise ModelNotFoundError(flag, config, f"{reason}; take those that are not quantized")
    if "transformers_weights" in settings:
        # The library would load that file instead of the one that is checked here.
        raise ModelNotFoundError(flag, config, "names a weight file of its own (transformers_weights)")
    _check_no_adapter(folder, flag)

    tensors = read_tensors(folder, component.library, flag)
    shapes = max(contents.shapes, key=lambda shapes: len(shapes.keys() & tensors.keys()))
    unread = [
        name
        for name in tensors.keys() - shapes.keys()
        if contents.unread is None or not contents.unread.fullmatch(name)
    ]
    if unread:
        name, kind = _worst(unread)
        raise ModelNotFoundError(flag, tensors[name].file, f"{_some(name, unread)}: {kind}")
    if missing := shapes.keys() - tensors.keys():
        raise ModelNotFoundError(flag, folder, f"no tensor {_some(min(missing), missing)} in the weights")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ModelNotFoundError(flag, tensor.file, f"{name} is {tensor.dtype}, not floating point")
        if tensor.shape != shape:
            reason = f"{name} is {_by(tensor.shape)}, config.json says {_by(shape)}"
            raise ModelNotFoundError(flag, tensor.file, reason)
    if contents.twins and shapes.keys() >= set(contents.twins):
        name, twin = contents.twins
        if not have_equal_data(name, twin, tensors):
            raise ModelNotFoundError(
                flag, tensors[twin].file, f"{twin} is not the same as {name}; remove one"
            )
    return {name: tensors[name] for name in shapes}


def _worst(names: Iterable[str]) -> tuple[str, str]:
    """The wrong tensor whose name explains most, and the explanation."""
    return next(
        (name, reason) for kind, reason in _UNREAD_KINDS for name in sorted(names) if kind.search(name)
    )


def _some(name: str, names: Iterable[str]) -> str:
    others = len(list(names)) - 1
    return f"{name} and {others} more" if others else name


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"
