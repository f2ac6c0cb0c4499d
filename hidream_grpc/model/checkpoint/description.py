"""Describes a checkpoint and checks that it is complete, before anything is loaded."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.errors import ModelNotFoundError
from hidream_grpc.model.checkpoint.configs import read_configs
from hidream_grpc.model.checkpoint.demo import DEMO_NAME, demo_checkpoint_path
from hidream_grpc.model.checkpoint.editing_model import check_no_editing_model
from hidream_grpc.model.checkpoint.files import (
    MODEL_PATH_FLAG,
    GenerationConfig,
    SchedulerConfig,
    read_json,
    read_pipeline_class,
)
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of
from hidream_grpc.model.checkpoint.hub import is_snapshot, repository_name
from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName, prompt_token_limits
from hidream_grpc.model.checkpoint.tokenizers.files import check_tokenizers
from hidream_grpc.model.checkpoint.variants import Variant, default_schedule, identify_variant
from hidream_grpc.model.checkpoint.weights.check import check_weights

logger = logging.getLogger(__name__)

_PIPELINE_CLASS = "HiDreamImagePipeline"
_DEFAULT_SIDE_PIXELS = 1024


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Values for the fields that a request does not set."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """What the files of a complete checkpoint say of it.

    Attributes:
        name: name of its folder, or of its repository in the hub's cache, or `demo`.
        variant: Full, Dev, Fast or custom.
        scheduler_name: class of the scheduler in diffusers.
        shift: shift of the scheduler's timesteps.
        defaults: defaults of the checkpoint's own `generation_config.json`, or else of the variant.
        size_limits: the sizes of images that can be generated.
        prompt_token_limits: most tokens of a prompt that each text encoder takes, special tokens included.
        num_attention_heads: attention heads of the transformer, which tensor parallel divides.
        num_routed_experts: routed experts of the transformer, which expert parallel divides.
        fingerprint: distinguishes the checkpoint from any other, also from a later one in the same folder.
    """

    name: str
    variant: Variant
    scheduler_name: str
    shift: float
    defaults: GenerationDefaults
    size_limits: SizeLimits
    prompt_token_limits: Mapping[TextEncoderName, int]
    num_attention_heads: int
    num_routed_experts: int
    fingerprint: str

    @property
    def trained_prompt_tokens(self) -> int:
        """Most tokens, for each text encoder, of a prompt that is padded as the model was trained."""
        return min(TRAINED_PROMPT_TOKENS, *self.prompt_token_limits.values())


def describe_checkpoint(model_path: Path, extra_model_path: Path | None) -> CheckpointDescription:
    """Check that a checkpoint is complete and fits together, and describe it.

    Only the configuration files, and headers and samples of the weights, are read.

    Args:
        model_path: a HiDream-I1 in diffusers format.
        extra_model_path: a Llama-3.1-8B-Instruct in transformers format; used, and checked, only
            where the checkpoint holds no Llama.

    Raises:
        ModelNotFoundError: a folder or a part of it is missing, cannot be read, or does not fit the
            others; the error names the flag to correct.
    """
    pipeline_class = read_pipeline_class(model_path)
    if pipeline_class != _PIPELINE_CLASS:
        raise ModelNotFoundError(
            MODEL_PATH_FLAG, model_path, f"model_index.json says {pipeline_class}, not {_PIPELINE_CLASS}"
        )
    configs = read_configs(model_path, extra_model_path)
    check_tokenizers(model_path, extra_model_path)
    check_no_editing_model(model_path / "transformer", configs.transformer)
    warnings = check_weights(model_path, extra_model_path, configs)

    scheduler, transformer, vae = configs.scheduler, configs.transformer, configs.vae
    token_side_pixels = 2 ** (len(vae.block_out_channels) - 1) * transformer.patch_size
    max_tokens = math.prod(transformer.max_resolution) // transformer.patch_size**2
    size_limits = SizeLimits(size_multiple=token_side_pixels, max_pixels=max_tokens * token_side_pixels**2)
    description = CheckpointDescription(
        name=_name(model_path),
        variant=identify_variant(scheduler.name, scheduler.timestep_shift),
        scheduler_name=scheduler.name,
        shift=scheduler.timestep_shift,
        defaults=_defaults(model_path, scheduler, size_limits),
        size_limits=size_limits,
        prompt_token_limits=prompt_token_limits(model_path, extra_model_path),
        num_attention_heads=transformer.num_attention_heads,
        num_routed_experts=transformer.num_routed_experts,
        fingerprint=fingerprint_of(model_path, extra_model_path),
    )
    # Last, so that a refused checkpoint gives one line.
    for warning in warnings:
        logger.warning("%s", warning)
    return description


def _name(model_path: Path) -> str:
    folder = model_path.resolve()
    if folder == demo_checkpoint_path().resolve():
        return DEMO_NAME
    return (repository_name(folder) if is_snapshot(folder) else None) or folder.name


def _defaults(model_path: Path, scheduler: SchedulerConfig, size_limits: SizeLimits) -> GenerationDefaults:
    schedule = default_schedule(scheduler.name, scheduler.timestep_shift)
    size = ImageSize(_DEFAULT_SIDE_PIXELS, _DEFAULT_SIDE_PIXELS)
    if not size_limits.allows(size):
        size = size_limits.largest_square()
    path = model_path / "generation_config.json"
    own = read_json(path, GenerationConfig, MODEL_PATH_FLAG) if os.path.lexists(path) else GenerationConfig()
    size = ImageSize(own.width or size.width, own.height or size.height)
    if not size_limits.allows(size):
        raise ModelNotFoundError(MODEL_PATH_FLAG, path, f"{size.width}×{size.height} cannot be generated")
    return GenerationDefaults(
        width=size.width,
        height=size.height,
        num_inference_steps=own.num_inference_steps or schedule.num_inference_steps,
        guidance_scale=schedule.guidance_scale if own.guidance_scale is None else own.guidance_scale,
    )
