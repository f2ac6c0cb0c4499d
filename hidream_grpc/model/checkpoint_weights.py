"""Whether weights are what their configuration says, told from the headers of their files. Torch-free."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint_configs import CheckpointConfigs
from hidream_grpc.model.checkpoint_files import MODEL_PATH_FLAG, llama_flag, llama_folder, read_json
from hidream_grpc.model.text_encoder_tensors import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.transformer_tensors import Shapes, transformer_tensors
from hidream_grpc.model.vae_tensors import vae_tensors
from hidream_grpc.model.weight_files import Library, StoredTensor, read_tensors

logger = logging.getLogger(__name__)

_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_DTYPES = ("F64", "F32", "F16", "BF16", *_FLOAT8)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# Why a tensor that is not read must not be passed over, by what its name has in it.
_UNREAD_KINDS = (
    (re.compile("lora", re.IGNORECASE), "LoRA tensors; merge them into the weights"),
    (
        re.compile(r"scale|absmax|quant|qweight|qzeros|zero_point|g_idx|weight_format|\.SCB$"),
        "quantized weights; take those that are not quantized",
    ),
    (re.compile(""), "tensors that this model does not have"),
)


# Tensors of published weights that are not read: buffers, and parts of a larger model that are not run.
_UNREAD_OF_CLIP = re.compile(
    r"text_model\.embeddings\.position_ids|vision_model\..+|visual_projection\.weight|logit_scale"
)
_UNREAD_OF_T5 = re.compile(r"(shared|encoder\.embed_tokens|lm_head)\.weight|decoder\..+")
_UNREAD_OF_LLAMA = re.compile(r"lm_head\.weight|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class _Component:
    """A component of a checkpoint, and what its configuration says of its weights.

    Attributes:
        folder: of its configuration and weights.
        flag: that named the folder.
        library: that it is of.
        shapes: of the tensors that are read, once for each way to name them.
        unread: names of other tensors that may be there.
    """

    folder: Path
    flag: str
    library: Library
    shapes: tuple[Shapes, ...]
    unread: re.Pattern[str] | None = None


def check_weights(model_path: Path, extra_model_path: Path | None, configs: CheckpointConfigs) -> None:
    """Check that every tensor that is read is there, is a number to compute with, and that no other is.

    Raises:
        ModelNotFoundError: a file is missing, is not whole, or holds something else.
    """
    components = list(_components(model_path, extra_model_path, configs))
    tensors_of = [_check_component(component) for component in components]
    for component, tensors in zip(components, tensors_of, strict=True):
        if float8 := {tensor.dtype for tensor in tensors.values()}.intersection(_FLOAT8):
            kinds = " and ".join(sorted(float8))
            logger.warning(
                "the weights in %s are %s, without scales: taken as they are", component.folder, kinds
            )


def _components(
    model_path: Path, extra_model_path: Path | None, configs: CheckpointConfigs
) -> Iterator[_Component]:
    def component(
        name: str, library: Library, *shapes: Shapes, unread: re.Pattern[str] | None = None
    ) -> _Component:
        return _Component(model_path / name, MODEL_PATH_FLAG, library, shapes, unread)

    yield component("transformer", Library.DIFFUSERS, transformer_tensors(configs.transformer))
    yield component("vae", Library.DIFFUSERS, vae_tensors(configs.vae))
    for name, clip in (("text_encoder", configs.clip_l), ("text_encoder_2", configs.clip_g)):
        yield component(name, Library.TRANSFORMERS, clip_tensors(clip), unread=_UNREAD_OF_CLIP)
    t5, llama = t5_tensors(configs.t5), llama_tensors(configs.llama)
    yield component(
        "text_encoder_3",
        Library.TRANSFORMERS,
        t5,
        # Both names are one matrix.
        {name.replace("shared.", "encoder.embed_tokens."): shape for name, shape in t5.items()},
        unread=_UNREAD_OF_T5,
    )
    yield _Component(
        llama_folder(model_path, extra_model_path),
        llama_flag(model_path),
        Library.TRANSFORMERS,
        # LlamaForCausalLM writes the first, LlamaModel the second.
        (llama, {name.removeprefix("model."): shape for name, shape in llama.items()}),
        _UNREAD_OF_LLAMA,
    )


def _check_component(component: _Component) -> dict[str, StoredTensor]:
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
    for name in _ADAPTER_FILES:
        if os.path.lexists(folder / name):
            raise ModelNotFoundError(
                flag, folder / name, "a LoRA that is not loaded; merge it into the weights"
            )

    tensors = read_tensors(folder, component.library, flag)
    shapes = max(component.shapes, key=lambda shapes: len(shapes.keys() & tensors.keys()))
    unread = [
        name
        for name in tensors.keys() - shapes.keys()
        if component.unread is None or not component.unread.fullmatch(name)
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
    return tensors


def _worst(names: Iterable[str]) -> tuple[str, str]:
    """The name that says most about what is wrong, and what that is."""
    return next(
        (name, reason) for kind, reason in _UNREAD_KINDS for name in sorted(names) if kind.search(name)
    )


def _some(name: str, names: Iterable[str]) -> str:
    others = len(list(names)) - 1
    return f"{name} and {others} more" if others else name


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"
