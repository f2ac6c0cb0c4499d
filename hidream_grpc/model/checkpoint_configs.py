"""The configurations of a checkpoint's components, and whether they fit together. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint_files import (
    EXTRA_MODEL_PATH_FLAG,
    LLAMA,
    MAX_SEQUENCE_LENGTH,
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
from hidream_grpc.model.variants import SUPPORTED_SCHEDULERS


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
        ModelNotFoundError: one is missing, cannot be read, or does not fit the others.
    """
    scheduler = _read_scheduler(model_path)
    transformer = _read_transformer(model_path)
    vae = read_json(model_path / "vae" / "config.json", VaeConfig, MODEL_PATH_FLAG)
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
        raise ModelNotFoundError(
            MODEL_PATH_FLAG, path, f"{len(transformer.llama_layers)} llama_layers for {num_blocks} blocks"
        )
    return transformer


def _read_clip(folder: Path) -> ClipConfig:
    clip = read_json(folder / "config.json", ClipConfig, MODEL_PATH_FLAG)
    if clip.max_position_embeddings < MAX_SEQUENCE_LENGTH:
        reason = f"has room for {clip.max_position_embeddings} tokens, {MAX_SEQUENCE_LENGTH} are needed"
        raise ModelNotFoundError(MODEL_PATH_FLAG, folder, reason)
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
    llama_width, last_layer = transformer.caption_channels[1], max(transformer.llama_layers)
    if llama.hidden_size != llama_width:
        reason = f"Llama gives {llama.hidden_size} numbers a token, the transformer takes {llama_width}"
        raise ModelNotFoundError(flag, folder, reason)
    if llama.num_hidden_layers <= last_layer:
        reason = f"Llama has {llama.num_hidden_layers} layers, the transformer reads layer {last_layer}"
        raise ModelNotFoundError(flag, folder, reason)
    return llama
