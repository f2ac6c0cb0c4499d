"""The files of a checkpoint: where each part is, and what its configuration says."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.hub import has_unfinished_download, snapshots_hint
from hidream_grpc.model.checkpoint.prompt_lengths import MAX_PROMPT_TOKENS

MODEL_PATH_FLAG = "-m/--model-path"
EXTRA_MODEL_PATH_FLAG = "-e/--extra-model-path"

LLAMA = "text_encoder_4"
LLAMA_TOKENIZER = "tokenizer_4"

_Positive = Annotated[int, msgspec.Meta(gt=0)]
# Names of tensors are made for each layer and expert, which would take for ever with an absurd number.
_NumLayers = Annotated[int, msgspec.Meta(ge=0, le=512)]
_NumExperts = Annotated[int, msgspec.Meta(gt=0, le=128)]


class SchedulerConfig(msgspec.Struct, frozen=True):
    """The file scheduler/scheduler_config.json; UniPC calls its shift flow_shift."""

    name: str = msgspec.field(name="_class_name")
    shift: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    flow_shift: Annotated[float, msgspec.Meta(gt=0)] | None = None
    num_train_timesteps: _Positive = 1000
    solver_order: _Positive = 2

    @property
    def timestep_shift(self) -> float:
        """Shift of the timesteps towards noise, under the name that this scheduler gives it."""
        return self.shift if self.flow_shift is None else self.flow_shift


class TransformerConfig(msgspec.Struct, frozen=True):
    """The file transformer/config.json, with the sizes of the transformer."""

    patch_size: _Positive
    in_channels: _Positive
    num_layers: _NumLayers
    num_single_layers: _NumLayers
    num_attention_heads: _Positive
    attention_head_dim: _Positive
    num_routed_experts: _NumExperts
    num_activated_experts: _NumExperts
    text_emb_dim: _Positive
    caption_channels: tuple[_Positive, _Positive]
    axes_dims_rope: tuple[_Positive, _Positive, _Positive]
    max_resolution: tuple[_Positive, _Positive]
    llama_layers: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(min_length=1)]
    out_channels: _Positive | None = None
    name_or_path: str | None = msgspec.field(name="_name_or_path", default=None)

    @property
    def width(self) -> int:
        """Number of channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.num_layers + self.num_single_layers

    @property
    def max_tokens(self) -> int:
        """Number of image tokens to which latents that are not square are padded."""
        return self.max_resolution[0] * self.max_resolution[1] // self.patch_size**2


class VaeConfig(msgspec.Struct, frozen=True):
    """The file vae/config.json: each block but the last halves the image. Defaults are those of diffusers."""

    block_out_channels: Annotated[tuple[_Positive, ...], msgspec.Meta(min_length=1, max_length=16)]
    in_channels: _Positive = 3
    out_channels: _Positive = 3
    latent_channels: _Positive = 4
    layers_per_block: _NumLayers = 1
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    norm_num_groups: _Positive = 32
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class ClipConfig(msgspec.Struct, frozen=True):
    """The config.json of text_encoder and of text_encoder_2. Defaults are those of transformers."""

    projection_dim: _Positive
    vocab_size: _Positive = 49408
    hidden_size: _Positive = 512
    intermediate_size: _Positive = 2048
    num_hidden_layers: _NumLayers = 12
    num_attention_heads: _Positive = 8
    max_position_embeddings: _Positive = 77


class T5Config(msgspec.Struct, frozen=True):
    """The file text_encoder_3/config.json. Defaults are those of transformers."""

    d_model: _Positive
    vocab_size: _Positive = 32128
    d_kv: _Positive = 64
    d_ff: _Positive = 2048
    num_layers: _NumLayers = 6
    num_heads: _Positive = 8
    relative_attention_num_buckets: _Positive = 32
    feed_forward_proj: str = "relu"


class LlamaConfig(msgspec.Struct, frozen=True):
    """The file config.json of the Llama folder. Defaults are those of transformers."""

    model_type: str
    vocab_size: _Positive = 32000
    hidden_size: _Positive = 4096
    intermediate_size: _Positive = 11008
    num_hidden_layers: _NumLayers = 32
    num_attention_heads: _Positive = 32
    num_key_value_heads: _Positive | None = None
    head_dim: _Positive | None = None
    attention_bias: bool = False
    mlp_bias: bool = False


class GenerationConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file generation_config.json, with the checkpoint's own defaults, each optional."""

    width: _Positive | None = None
    height: _Positive | None = None
    num_inference_steps: _Positive | None = None
    guidance_scale: Annotated[float, msgspec.Meta(ge=0.0)] | None = None


# Library and class; diffusers writes [null, null] for a component that is missing.
_IndexEntry = tuple[str | None, str | None] | None


class _PipelineIndex(msgspec.Struct, frozen=True):
    """The file model_index.json. All components of the pipeline are known; only Llama may be missing."""

    name: str = msgspec.field(name="_class_name")
    text_encoder_4: _IndexEntry = None
    tokenizer_4: _IndexEntry = None


class _TokenizerConfig(msgspec.Struct, frozen=True):
    model_max_length: Annotated[float, msgspec.Meta(ge=1)] | None = None


_Config = TypeVar("_Config")

UNFINISHED_DOWNLOAD = "; a download into its folder has not finished"
_LFS_POINTER = b"version https://git-lfs"


def check_file(path: Path, flag: str) -> None:
    """Check that a file exists, and is no placeholder for the real file.

    Raises:
        ModelNotFoundError: the file is missing, a dangling link, no file, or a pointer of Git LFS.
    """
    if not path.is_file():
        raise ModelNotFoundError(flag, path, _why_no_file(path))
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise ModelNotFoundError(flag, path, str(error)) from None
    if is_pointer:
        raise ModelNotFoundError(flag, path, "a pointer of Git LFS, not the file itself: run `git lfs pull`")


def _why_no_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        reason = f"a link to {path.readlink()}, which is not there" if path.is_symlink() else "no such file"
        if has_unfinished_download(path.parent):
            reason += UNFINISHED_DOWNLOAD
        return reason + snapshots_hint(path.parent)
    except OSError as error:
        return "a link that leads to itself" if error.errno == errno.ELOOP else error.strerror or str(error)
    return "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file"


def read_json(path: Path, config_type: type[_Config], flag: str) -> _Config:
    """Read one configuration file.

    Raises:
        ModelNotFoundError: the file is missing, or lacks a value or has a wrong one.
    """
    check_file(path, flag)
    try:
        return msgspec.json.decode(path.read_bytes(), type=config_type)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelNotFoundError(flag, path, str(error)) from error


def read_pipeline_class(model_path: Path) -> str:
    """The pipeline class of diffusers for which the checkpoint is made."""
    if not model_path.is_dir():
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path)
    index = model_path / "model_index.json"
    if not os.path.lexists(index):
        reason = f"no model_index.json: not in diffusers format{snapshots_hint(model_path)}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)
    return read_json(index, _PipelineIndex, MODEL_PATH_FLAG).name


def has_llama(model_path: Path) -> bool:
    """Whether the checkpoint itself holds the Llama text encoder."""
    index = read_json(model_path / "model_index.json", _PipelineIndex, MODEL_PATH_FLAG)
    return all(
        any(entry or ()) and (model_path / name).is_dir()
        for name, entry in ((LLAMA, index.text_encoder_4), (LLAMA_TOKENIZER, index.tokenizer_4))
    )


def llama_folder(model_path: Path, extra_model_path: Path | None) -> Path:
    """Folder of the Llama text encoder, in the checkpoint or apart from it."""
    if has_llama(model_path):
        return model_path / LLAMA
    if extra_model_path is None:
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, f"holds no {LLAMA}")
    return extra_model_path


def llama_flag(model_path: Path) -> str:
    """The flag that names the folder of Llama and its tokenizer."""
    return MODEL_PATH_FLAG if has_llama(model_path) else EXTRA_MODEL_PATH_FLAG


def llama_tokenizer_folder(model_path: Path, extra_model_path: Path | None) -> Path:
    """Folder of the tokenizer of the Llama text encoder."""
    folder = llama_folder(model_path, extra_model_path)
    return model_path / LLAMA_TOKENIZER if folder == model_path / LLAMA else folder


def token_limit(tokenizer_folder: Path, flag: str = MODEL_PATH_FLAG) -> int:
    """Most tokens that the pipeline passes to the encoder of this tokenizer, at most `MAX_PROMPT_TOKENS`."""
    path = tokenizer_folder / "tokenizer_config.json"
    if not path.is_file():
        return MAX_PROMPT_TOKENS
    own_limit = read_json(path, _TokenizerConfig, flag).model_max_length
    return MAX_PROMPT_TOKENS if own_limit is None else int(min(MAX_PROMPT_TOKENS, own_limit))
