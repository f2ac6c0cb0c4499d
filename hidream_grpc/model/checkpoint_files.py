"""The files of a checkpoint: where each part lies, what its configuration says. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.hub import has_unfinished_download

MODEL_PATH_FLAG = "-m/--model-path"
EXTRA_MODEL_PATH_FLAG = "-e/--extra-model-path"

LLAMA = "text_encoder_4"
LLAMA_TOKENIZER = "tokenizer_4"

# The pipeline's default max_sequence_length: every prompt is padded to so many tokens.
MAX_SEQUENCE_LENGTH = 128

_Positive = Annotated[int, msgspec.Meta(gt=0)]


class SchedulerConfig(msgspec.Struct, frozen=True):
    """scheduler/scheduler_config.json; UniPC calls its shift flow_shift."""

    name: str = msgspec.field(name="_class_name")
    shift: float = 1.0
    flow_shift: float | None = None

    @property
    def timestep_shift(self) -> float:
        """Shift of the timesteps towards noise, whatever this scheduler calls it."""
        return self.shift if self.flow_shift is None else self.flow_shift


class TransformerConfig(msgspec.Struct, frozen=True):
    """transformer/config.json: the sizes of the transformer."""

    patch_size: _Positive
    in_channels: _Positive
    num_layers: int
    num_single_layers: int
    num_attention_heads: _Positive
    attention_head_dim: _Positive
    num_routed_experts: _Positive
    num_activated_experts: _Positive
    text_emb_dim: int
    caption_channels: tuple[int, int]
    axes_dims_rope: tuple[int, ...]
    max_resolution: tuple[_Positive, _Positive]
    llama_layers: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    out_channels: int | None = None
    name_or_path: str | None = msgspec.field(name="_name_or_path", default=None)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_blocks(self) -> int:
        """Blocks of both kinds."""
        return self.num_layers + self.num_single_layers

    @property
    def max_tokens(self) -> int:
        """Image tokens that latents which are not square are padded to."""
        return self.max_resolution[0] * self.max_resolution[1] // self.patch_size**2


class VaeConfig(msgspec.Struct, frozen=True):
    """vae/config.json: each block but the last halves the picture. Defaults are those of diffusers."""

    block_out_channels: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 1
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ()
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ()
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class ClipConfig(msgspec.Struct, frozen=True):
    """text_encoder/config.json and text_encoder_2/config.json. Defaults are those of transformers."""

    projection_dim: int
    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    max_position_embeddings: int = 77


class T5Config(msgspec.Struct, frozen=True):
    """text_encoder_3/config.json. Defaults are those of transformers."""

    d_model: int
    vocab_size: int = 32128
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    feed_forward_proj: str = "relu"


class LlamaConfig(msgspec.Struct, frozen=True):
    """config.json of the Llama folder. Defaults are those of transformers."""

    model_type: str
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: _Positive = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False


class GenerationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """generation_config.json: a checkpoint's own defaults, each optional."""

    width: _Positive | None = None
    height: _Positive | None = None
    num_inference_steps: _Positive | None = None
    guidance_scale: Annotated[float, msgspec.Meta(ge=0.0)] | None = None


class _PipelineIndex(msgspec.Struct, frozen=True):
    name: str = msgspec.field(name="_class_name")


class _TokenizerConfig(msgspec.Struct, frozen=True):
    model_max_length: float | None = None


_Config = TypeVar("_Config")

UNFINISHED_DOWNLOAD = "; a download into its folder has not finished"
_LFS_POINTER = b"version https://git-lfs"


def check_file(path: Path, flag: str) -> None:
    """Check that a file is there, itself and not what stands for it.

    Raises:
        ModelNotFoundError: it is missing, a link to nothing, or a pointer of Git LFS.
    """
    if not path.is_file():
        is_broken = path.is_symlink()
        reason = f"a link to {path.readlink()}, which is not there" if is_broken else "no such file"
        if has_unfinished_download(path.parent):
            reason += UNFINISHED_DOWNLOAD
        raise ModelNotFoundError(flag, path, reason)
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise ModelNotFoundError(flag, path, str(error)) from None
    if is_pointer:
        raise ModelNotFoundError(flag, path, "a pointer of Git LFS, not the file itself: run `git lfs pull`")


def read_json(path: Path, config_type: type[_Config], flag: str) -> _Config:
    """Read one configuration file.

    Raises:
        ModelNotFoundError: it is missing, or does not say what it must.
    """
    check_file(path, flag)
    try:
        return msgspec.json.decode(path.read_bytes(), type=config_type)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelNotFoundError(flag, path, str(error)) from error


def read_pipeline_class(model_path: Path) -> str:
    """Class of the pipeline in diffusers that the checkpoint is made for."""
    if not model_path.is_dir():
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path)
    index = model_path / "model_index.json"
    if not os.path.lexists(index):
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, "no model_index.json: not in diffusers format")
    return read_json(index, _PipelineIndex, MODEL_PATH_FLAG).name


def has_llama(model_path: Path) -> bool:
    """Whether the checkpoint itself holds the Llama text encoder."""
    index: dict[str, Any] = read_json(model_path / "model_index.json", dict[str, Any], MODEL_PATH_FLAG)
    return all(
        # diffusers writes [null, null] for a component that was left out.
        any(index.get(component) or ()) and (model_path / component).is_dir()
        for component in (LLAMA, LLAMA_TOKENIZER)
    )


def llama_folder(model_path: Path, extra_model_path: Path | None) -> Path:
    """Where the Llama text encoder lies: in the checkpoint, or in a folder of its own."""
    if has_llama(model_path):
        return model_path / LLAMA
    if extra_model_path is None:
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, f"holds no {LLAMA}")
    return extra_model_path


def llama_flag(model_path: Path) -> str:
    """Flag that names the folder in which Llama and its tokenizer lie."""
    return MODEL_PATH_FLAG if has_llama(model_path) else EXTRA_MODEL_PATH_FLAG


def llama_tokenizer_folder(model_path: Path, extra_model_path: Path | None) -> Path:
    """Where the tokenizer of the Llama text encoder lies."""
    folder = llama_folder(model_path, extra_model_path)
    return model_path / LLAMA_TOKENIZER if folder == model_path / LLAMA else folder


def token_limit(tokenizer_folder: Path, flag: str = MODEL_PATH_FLAG) -> int:
    """Most tokens that the pipeline gives to the encoder of this tokenizer."""
    path = tokenizer_folder / "tokenizer_config.json"
    if not path.is_file():
        return MAX_SEQUENCE_LENGTH
    own_limit = read_json(path, _TokenizerConfig, flag).model_max_length
    return MAX_SEQUENCE_LENGTH if own_limit is None else int(min(MAX_SEQUENCE_LENGTH, own_limit))
