"""The noise schedulers of diffusers, one object per request: they keep history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from hidream_grpc.errors import SnapshotError
from hidream_grpc.model.diffusers_private import calculate_shift, set_steps_done

SCHEDULER_CLASSES = {
    scheduler_class.__name__: scheduler_class
    for scheduler_class in (UniPCMultistepScheduler, FlowMatchLCMScheduler, FlowMatchEulerDiscreteScheduler)
}


def new_scheduler(
    prototype: SchedulerMixin, num_inference_steps: int, max_sequence_tokens: int
) -> SchedulerMixin:
    """Make a scheduler that is at the first of its steps.

    Args:
        prototype: the checkpoint's scheduler, of which only the configuration is used.
        num_inference_steps: number of denoising steps.
        max_sequence_tokens: max_seq of the transformer, for which the published schedule is made.

    Source: diffusers 0.42.1 pipeline_hidream_image.py, "Prepare timesteps" of `__call__`.
    """
    scheduler = type(prototype).from_config(prototype.config)
    if isinstance(scheduler, UniPCMultistepScheduler):
        scheduler.set_timesteps(num_inference_steps)
    else:
        scheduler.set_timesteps(num_inference_steps, mu=calculate_shift(max_sequence_tokens))
    # Otherwise the first step is found by its timestep, and the rounded timesteps of UniPC can be equal.
    scheduler.set_begin_index(0)
    return scheduler


def scheduler_step(
    scheduler: SchedulerMixin,
    noise_prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Compute the latents after one denoising step.

    Args:
        scheduler: scheduler of this request; it advances to its next step.
        noise_prediction: (N, 16, H/8, W/8), after guidance.
        timestep: (), the timestep of this step.
        latents: (N, 16, H/8, W/8), before the step.
        generators: one per image; LCM generates new noise in every step.
    """
    arguments: dict[str, Any] = {"return_dict": False}
    if not isinstance(scheduler, UniPCMultistepScheduler):
        arguments["generator"] = list(generators)
    next_latents: Tensor = scheduler.step(noise_prediction, timestep, latents, **arguments)[0]
    return next_latents.to(latents.dtype)


@dataclass(frozen=True, slots=True)
class SchedulerHistory:
    """The state of a scheduler after some steps, apart from their number.

    The flow-match schedulers have no other state.

    Attributes:
        scheduler_name: class of the scheduler.
        model_outputs: the latest outputs for UniPC, (N, C, H, W) each, oldest first; None for those that
            are not there yet.
        last_sample: (N, C, H, W), the sample that UniPC corrects in the next step.
        lower_order_nums: number of UniPC's steps, up to its order.
        this_order: order of UniPC's latest step.

    Source: diffusers 0.42.1 scheduling_unipc_multistep.py, `step`.
    """

    scheduler_name: str
    model_outputs: tuple[Tensor | None, ...] = ()
    last_sample: Tensor | None = None
    lower_order_nums: int = 0
    this_order: int = 0

    @classmethod
    def of(cls, scheduler: SchedulerMixin) -> SchedulerHistory:
        """Take the current history; later steps do not change it."""
        name = type(scheduler).__name__
        if not isinstance(scheduler, UniPCMultistepScheduler):
            return cls(name)
        return cls(
            scheduler_name=name,
            model_outputs=tuple(scheduler.model_outputs),
            last_sample=scheduler.last_sample,
            lower_order_nums=scheduler.lower_order_nums,
            # UniPC has no such attribute before its first step.
            this_order=getattr(scheduler, "this_order", 0),
        )

    def put_into(self, scheduler: SchedulerMixin, step: int) -> None:
        """Bring a new scheduler of the same timesteps to its state after `step` steps.

        Raises:
            SnapshotError: the scheduler has another class or order.
        """
        if type(scheduler).__name__ != self.scheduler_name:
            raise SnapshotError(f"of a {self.scheduler_name}, not {type(scheduler).__name__}")
        set_steps_done(scheduler, step)
        if isinstance(scheduler, UniPCMultistepScheduler):
            order = len(scheduler.model_outputs)
            if len(self.model_outputs) != order:
                raise SnapshotError(f"of order {len(self.model_outputs)}, not {order}")
            scheduler.model_outputs = list(self.model_outputs)
            scheduler.timestep_list = [
                scheduler.timesteps[index] if index >= 0 else None for index in range(step - order, step)
            ]
            scheduler.last_sample = self.last_sample
            scheduler.lower_order_nums = self.lower_order_nums
            scheduler.this_order = self.this_order
