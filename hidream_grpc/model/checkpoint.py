"""What a checkpoint is and whether it is whole, found out before anything is loaded. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint_files import (
    EXTRA_MODEL_PATH_FLAG,
    LLAMA,
    MAX_SEQUENCE_LENGTH,
    MODEL_PATH_FLAG,
    ClipConfig,
    GenerationConfig,
    LlamaConfig,
    SchedulerConfig,
    T5Config,
    TransformerConfig,
    VaeConfig,
    check_tokenizer,
    has_llama,
    llama_folder,
    llama_tokenizer_folder,
    read_json,
    read_pipeline_class,
    token_limit,
)
from hidream_grpc.model.demo import DEMO_NAME, demo_checkpoint_path
from hidream_grpc.model.fingerprint import fingerprint_of
from hidream_grpc.model.sizes import ImageSize, SizeLimits
from hidream_grpc.model.variants import SUPPORTED_SCHEDULERS, Variant, default_schedule, identify_variant
from hidream_grpc.model.weight_files import Library, read_tensors

_PIPELINE_CLASS = "HiDreamImagePipeline"
_DEFAULT_SIDE_PIXELS = 1024


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a request gets that does not say."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """A whole checkpoint, as its files tell.

    Attributes:
        name: of its folder, or `demo`.
        variant: Full, Dev, Fast or custom.
        scheduler_name: class of the scheduler in diffusers.
        shift: of the scheduler's timesteps.
        defaults: of the variant, or of the checkpoint's own `generation_config.json`.
        size_limits: which sizes can be drawn.
        max_prompt_tokens: of each text encoder, special tokens included.
        num_attention_heads: of the transformer; tensor parallel divides them.
        num_routed_experts: of the transformer; expert parallel divides them.
        needs_extra_model: the checkpoint itself holds no Llama.
        fingerprint: tells it from any other checkpoint, also from a later one in the same folder.
    """

    name: str
    variant: Variant
    scheduler_name: str
    shift: float
    defaults: GenerationDefaults
    size_limits: SizeLimits
    max_prompt_tokens: int
    num_attention_heads: int
    num_routed_experts: int
    needs_extra_model: bool
    fingerprint: str


def describe_checkpoint(model_path: Path, extra_model_path: Path | None) -> CheckpointDescription:
    """Check that a checkpoint is whole and fits together, and say what it is.

    Reads configuration files; of the weights it checks that the files are there, and reads samples.

    Args:
        model_path: a HiDream-I1 in diffusers format.
        extra_model_path: a Llama-3.1-8B-Instruct in transformers format; used, and checked, only
            where the checkpoint holds no Llama.

    Raises:
        ModelNotFoundError: a folder or a part of it is missing, cannot be read, or does not fit the
            others; it names the flag to correct.
    """
    pipeline_class = read_pipeline_class(model_path)
    if pipeline_class != _PIPELINE_CLASS:
        raise ModelNotFoundError(
            MODEL_PATH_FLAG, model_path, f"model_index.json says {pipeline_class}, not {_PIPELINE_CLASS}"
        )
    scheduler = _read_scheduler(model_path)
    transformer = _read_transformer(model_path)
    vae = read_json(model_path / "vae" / "config.json", VaeConfig, MODEL_PATH_FLAG)
    read_tensors(model_path / "vae", Library.DIFFUSERS)
    _check_text_encoders(model_path, transformer)
    _check_llama(model_path, extra_model_path, transformer)

    token_side_pixels = 2 ** (len(vae.block_out_channels) - 1) * transformer.patch_size
    max_tokens = math.prod(transformer.max_resolution) // transformer.patch_size**2
    size_limits = SizeLimits(size_multiple=token_side_pixels, max_pixels=max_tokens * token_side_pixels**2)
    return CheckpointDescription(
        name=_name(model_path),
        variant=identify_variant(scheduler.name, scheduler.timestep_shift),
        scheduler_name=scheduler.name,
        shift=scheduler.timestep_shift,
        defaults=_defaults(model_path, scheduler, size_limits),
        size_limits=size_limits,
        max_prompt_tokens=min(
            token_limit(model_path / "tokenizer_3"),
            token_limit(llama_tokenizer_folder(model_path, extra_model_path)),
            MAX_SEQUENCE_LENGTH,
        ),
        num_attention_heads=transformer.num_attention_heads,
        num_routed_experts=transformer.num_routed_experts,
        needs_extra_model=not has_llama(model_path),
        fingerprint=fingerprint_of(model_path, extra_model_path),
    )


def _name(model_path: Path) -> str:
    folder = model_path.resolve()
    return DEMO_NAME if folder == demo_checkpoint_path().resolve() else folder.name


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
    read_tensors(path.parent, Library.DIFFUSERS)
    num_blocks = transformer.num_layers + transformer.num_single_layers
    if len(transformer.llama_layers) != num_blocks:
        raise ModelNotFoundError(
            MODEL_PATH_FLAG, path, f"{len(transformer.llama_layers)} llama_layers for {num_blocks} blocks"
        )
    return transformer


def _check_text_encoders(model_path: Path, transformer: TransformerConfig) -> None:
    clips = []
    for number in ("", "_2"):
        folder = model_path / f"text_encoder{number}"
        clip = read_json(folder / "config.json", ClipConfig, MODEL_PATH_FLAG)
        read_tensors(folder, Library.TRANSFORMERS)
        check_tokenizer(model_path / f"tokenizer{number}", MODEL_PATH_FLAG, with_vocabulary_files=True)
        if clip.max_position_embeddings < MAX_SEQUENCE_LENGTH:
            reason = f"has room for {clip.max_position_embeddings} tokens, {MAX_SEQUENCE_LENGTH} are needed"
            raise ModelNotFoundError(MODEL_PATH_FLAG, folder, reason)
        clips.append(clip)
    t5 = read_json(model_path / "text_encoder_3" / "config.json", T5Config, MODEL_PATH_FLAG)
    read_tensors(model_path / "text_encoder_3", Library.TRANSFORMERS)
    check_tokenizer(model_path / "tokenizer_3", MODEL_PATH_FLAG)
    pooled_width = sum(clip.projection_dim for clip in clips)
    if pooled_width != transformer.text_emb_dim:
        reason = f"CLIP gives {pooled_width} numbers, the transformer takes {transformer.text_emb_dim}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)
    t5_width = transformer.caption_channels[0]
    if t5.d_model != t5_width:
        reason = f"T5 gives {t5.d_model} numbers a token, the transformer takes {t5_width}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)


def _check_llama(model_path: Path, extra_model_path: Path | None, transformer: TransformerConfig) -> None:
    if has_llama(model_path):
        flag = MODEL_PATH_FLAG
    elif extra_model_path is None:
        reason = f"holds no {LLAMA}; name a Llama-3.1-8B-Instruct folder with {EXTRA_MODEL_PATH_FLAG}"
        raise ModelNotFoundError(MODEL_PATH_FLAG, model_path, reason)
    elif not extra_model_path.is_dir():
        raise ModelNotFoundError(EXTRA_MODEL_PATH_FLAG, extra_model_path)
    else:
        flag = EXTRA_MODEL_PATH_FLAG
    folder = llama_folder(model_path, extra_model_path)
    llama = read_json(folder / "config.json", LlamaConfig, flag)
    if llama.model_type != "llama":
        raise ModelNotFoundError(flag, folder, f"is a {llama.model_type} model, not llama")
    read_tensors(folder, Library.TRANSFORMERS, flag)
    check_tokenizer(llama_tokenizer_folder(model_path, extra_model_path), flag)
    llama_width, last_layer = transformer.caption_channels[1], max(transformer.llama_layers)
    if llama.hidden_size != llama_width:
        reason = f"Llama gives {llama.hidden_size} numbers a token, the transformer takes {llama_width}"
        raise ModelNotFoundError(flag, folder, reason)
    if llama.num_hidden_layers <= last_layer:
        reason = f"Llama has {llama.num_hidden_layers} layers, the transformer reads layer {last_layer}"
        raise ModelNotFoundError(flag, folder, reason)


def _defaults(model_path: Path, scheduler: SchedulerConfig, size_limits: SizeLimits) -> GenerationDefaults:
    schedule = default_schedule(scheduler.name, scheduler.timestep_shift)
    size = ImageSize(_DEFAULT_SIDE_PIXELS, _DEFAULT_SIDE_PIXELS)
    if not size_limits.allows(size):
        size = size_limits.largest_square()
    path = model_path / "generation_config.json"
    own = read_json(path, GenerationConfig, MODEL_PATH_FLAG) if path.exists() else GenerationConfig()
    size = ImageSize(own.width or size.width, own.height or size.height)
    if not size_limits.allows(size):
        raise ModelNotFoundError(MODEL_PATH_FLAG, path, f"{size.width}×{size.height} cannot be drawn")
    return GenerationDefaults(
        width=size.width,
        height=size.height,
        num_inference_steps=own.num_inference_steps or schedule.num_inference_steps,
        guidance_scale=schedule.guidance_scale if own.guidance_scale is None else own.guidance_scale,
    )
