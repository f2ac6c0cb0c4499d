"""The configurations of a checkpoint's components, and whether they fit together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.files import (
    EXTRA_MODEL_PATH_FLAG,
    LLAMA,
    MODEL_PATH_FLAG,
    ClipConfig,
    LlamaConfig,
    SchedulerConfig,
    T5Config,
    TransformerConfig,
    VaeConfig,
    has_llama,
    llama_flag,
    llama_folder,
    read_json,
)
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.variants import SUPPORTED_SCHEDULERS


@dataclass(frozen=True, slots=True)
class CheckpointConfigs:
    """The configuration of each component."""

    scheduler: SchedulerConfig
    transformer: TransformerConfig
    vae: VaeConfig
    clip_l: ClipConfig
    clip_g: ClipConfig
    t5: T5Config
    llama: LlamaConfig


def read_configs(model_path: Path, extra_model_path: Path | None) -> CheckpointConfigs:
    """Read the configurations of a checkpoint, and check that they fit together.

    Raises:
        ModelNotFoundError: a configuration is missing, cannot be read, or does not fit the others.
    """
    scheduler = _read_scheduler(model_path)
    transformer = _read_transformer(model_path)
    vae = _read_vae(model_path)
    for name, channels in (
        ("in_channels", transformer.in_channels),
        ("out_channels", transformer.out_channels or transformer.in_channels),
    ):
        if channels != vae.latent_channels:
            reason = f"{name} is {channels}, latent_channels of the autoencoder {vae.latent_channels}"
            _refuse(model_path / "transformer", reason)
    clip_l, clip_g = (_read_clip(model_path / name) for name in ("text_encoder", "text_encoder_2"))
    pooled_width = clip_l.projection_dim + clip_g.projection_dim
    if pooled_width != transformer.text_emb_dim:
        reason = f"CLIP gives {pooled_width} numbers, the transformer takes {transformer.text_emb_dim}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)
    t5 = read_json(model_path / "text_encoder_3" / "config.json", T5Config, MODEL_PATH_FLAG)
    t5_width = transformer.caption_channels[0]
    if t5.d_model != t5_width:
        reason = f"T5 gives {t5.d_model} numbers a token, the transformer takes {t5_width}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)
    llama = _read_llama(model_path, extra_model_path, transformer)
    return CheckpointConfigs(scheduler, transformer, vae, clip_l, clip_g, t5, llama)


def _read_scheduler(model_path: Path) -> SchedulerConfig:
    path = model_path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path, SchedulerConfig, MODEL_PATH_FLAG)
    if scheduler.name not in SUPPORTED_SCHEDULERS:
        supported = ", ".join(SUPPORTED_SCHEDULERS)
        reason = f"scheduler {scheduler.name} is not one of {supported}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, path, reason)
    return scheduler


def _read_transformer(model_path: Path) -> TransformerConfig:
    path = model_path / "transformer" / "config.json"
    transformer = read_json(path, TransformerConfig, MODEL_PATH_FLAG)
    num_blocks = transformer.num_layers + transformer.num_single_layers
    if len(transformer.llama_layers) != num_blocks:
        _refuse(path.parent, f"{len(transformer.llama_layers)} llama_layers for {num_blocks} blocks")
    active, routed = transformer.num_activated_experts, transformer.num_routed_experts
    if active > routed:
        _refuse(path.parent, f"num_activated_experts is {active}, num_routed_experts {routed}")
    axes, head_dim = transformer.axes_dims_rope, transformer.attention_head_dim
    # The library rotates all channels of a head, or the first half of them.
    if any(axis % 2 for axis in axes) or sum(axes) not in {head_dim, head_dim / 2}:
        reason = f"not three even numbers with the sum attention_head_dim, {head_dim}, or half of it"
        _refuse(path.parent, f"axes_dims_rope is {axes}, {reason}")
    return transformer


def _read_vae(model_path: Path) -> VaeConfig:
    folder = model_path / "vae"
    vae = read_json(folder / "config.json", VaeConfig, MODEL_PATH_FLAG)
    channels = vae.block_out_channels
    for name in ("down_block_types", "up_block_types"):
        if (num_blocks := len(getattr(vae, name))) != len(channels):
            _refuse(folder, f"{name} has {num_blocks}, block_out_channels {len(channels)}")
    if any(width % vae.norm_num_groups for width in channels):
        reason = f"are not all multiples of norm_num_groups, {vae.norm_num_groups}"
        _refuse(folder, f"block_out_channels {channels} {reason}")
    if vae.scaling_factor == 0:
        _refuse(folder, "scaling_factor is 0")
    if (vae.in_channels, vae.out_channels) != (3, 3):
        reason = f"in_channels and out_channels are {vae.in_channels} and {vae.out_channels}, an image has 3"
        _refuse(folder, reason)
    return vae


def _read_clip(folder: Path) -> ClipConfig:
    clip = read_json(folder / "config.json", ClipConfig, MODEL_PATH_FLAG)
    if clip.max_position_embeddings < TRAINED_PROMPT_TOKENS:
        reason = f"has room for {clip.max_position_embeddings} tokens, {TRAINED_PROMPT_TOKENS} are needed"
        raise ModelNotFoundError(MODEL_PATH_FLAG, folder, reason)
    _check_multiple(folder, MODEL_PATH_FLAG, clip, "hidden_size", "num_attention_heads")
    return clip


def _read_llama(
    model_path: Path, extra_model_path: Path | None, transformer: TransformerConfig
) -> LlamaConfig:
    if not has_llama(model_path):
        if extra_model_path is None:
            reason = f"holds no {LLAMA}; name a Llama-3.1-8B-Instruct folder with {EXTRA_MODEL_PATH_FLAG}"
            raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)
        if not extra_model_path.is_dir():
            raise ModelNotFoundError(EXTRA_MODEL_PATH_FLAG, extra_model_path)
    flag = llama_flag(model_path)
    folder = llama_folder(model_path, extra_model_path)
    llama = read_json(folder / "config.json", LlamaConfig, flag)
    if llama.model_type != "llama":
        raise ModelNotFoundError(flag, folder, f"is a {llama.model_type} model, not llama")
    if llama.head_dim is None:
        _check_multiple(folder, flag, llama, "hidden_size", "num_attention_heads")
    if (head_dim := llama.head_dim or llama.hidden_size // llama.num_attention_heads) % 2:
        _refuse(folder, f"the heads have {head_dim} channels, not an even number", flag)
    if llama.num_key_value_heads is not None:
        _check_multiple(folder, flag, llama, "num_attention_heads", "num_key_value_heads")
    llama_width, last_layer = transformer.caption_channels[1], max(transformer.llama_layers)
    if llama.hidden_size != llama_width:
        reason = f"Llama gives {llama.hidden_size} numbers a token, the transformer takes {llama_width}"
        raise ModelNotFoundError(flag, folder, reason)
    if llama.num_hidden_layers <= last_layer:
        reason = f"Llama has {llama.num_hidden_layers} layers, the transformer reads layer {last_layer}"
        raise ModelNotFoundError(flag, folder, reason)
    return llama


def _check_multiple(
    folder: Path, flag: str, config: ClipConfig | LlamaConfig, name: str, divisor_name: str
) -> None:
    number, divisor = getattr(config, name), getattr(config, divisor_name)
    if number % divisor:
        _refuse(folder, f"{name} is {number}, no multiple of {divisor_name}, {divisor}", flag)


def _refuse(folder: Path, reason: str, flag: str = MODEL_PATH_FLAG) -> NoReturn:
    raise ModelNotFoundError(flag, folder / "config.json", reason)
