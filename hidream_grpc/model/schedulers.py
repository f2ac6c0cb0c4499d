"""The noise schedulers of diffusers, one object per request: they keep history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift
from torch import Tensor

SCHEDULER_CLASSES = {
    scheduler_class.__name__: scheduler_class
    for scheduler_class in (UniPCMultistepScheduler, FlowMatchLCMScheduler, FlowMatchEulerDiscreteScheduler)
}


def new_scheduler(
    prototype: SchedulerMixin, num_inference_steps: int, max_sequence_tokens: int
) -> SchedulerMixin:
    """A scheduler at the first of its steps.

    Args:
        prototype: the checkpoint's scheduler; only its configuration is used.
        num_inference_steps: denoising steps.
        max_sequence_tokens: the transformer's max_seq, which the published schedule is made for.

    Source: diffusers 0.42.1 pipeline_hidream_image.py, "Prepare timesteps" of `__call__`.
    """
    scheduler = type(prototype).from_config(prototype.config)
    if isinstance(scheduler, UniPCMultistepScheduler):
        scheduler.set_timesteps(num_inference_steps)
    else:
        scheduler.set_timesteps(num_inference_steps, mu=calculate_shift(max_sequence_tokens))
    # Otherwise the first step is looked up by its timestep, and UniPC's rounded ones can be equal.
    scheduler.set_begin_index(0)
    return scheduler


def scheduler_step(
    scheduler: SchedulerMixin,
    noise_prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Latents after one denoising step.

    Args:
        scheduler: of this request; it moves on to its next step.
        noise_prediction: (N, 16, H/8, W/8), after guidance.
        timestep: (), of this step.
        latents: (N, 16, H/8, W/8), before the step.
        generators: one per image; LCM draws new noise in every step.
    """
    arguments: dict[str, Any] = {"return_dict": False}
    if not isinstance(scheduler, UniPCMultistepScheduler):
        arguments["generator"] = list(generators)
    next_latents: Tensor = scheduler.step(noise_prediction, timestep, latents, **arguments)[0]
    return next_latents.to(latents.dtype)
