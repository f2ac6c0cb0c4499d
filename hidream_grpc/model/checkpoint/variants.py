"""The variants of HiDream-I1, which are recognised by their noise schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Variant(StrEnum):
    """The published checkpoints; CUSTOM is any other scheduler or shift."""

    FULL = "full"
    DEV = "dev"
    FAST = "fast"
    CUSTOM = "custom"


@dataclass(frozen=True, slots=True)
class Schedule:
    """The settings with which a checkpoint is meant to be sampled.

    Attributes:
        scheduler_name: class of the scheduler in diffusers.
        shift: shift of its timesteps towards noise.
        num_inference_steps: default number of denoising steps.
        guidance_scale: default guidance scale; 0 turns guidance off (the distilled variants need none).
    """

    scheduler_name: str
    shift: float
    num_inference_steps: int
    guidance_scale: float

    @property
    def needs_guidance(self) -> bool:
        """Whether a guidance scale that turns guidance off gives poor images."""
        return self.guidance_scale > MAX_SCALE_WITHOUT_GUIDANCE


MAX_SCALE_WITHOUT_GUIDANCE = 1.0
"""Largest guidance scale that means no guidance (diffusers: guidance_scale > 1)."""
UNIPC = "UniPCMultistepScheduler"
FLOW_MATCH_LCM = "FlowMatchLCMScheduler"
FLOW_MATCH_EULER = "FlowMatchEulerDiscreteScheduler"
SUPPORTED_SCHEDULERS = (UNIPC, FLOW_MATCH_LCM, FLOW_MATCH_EULER)

# Source: the model cards of HiDream-I1-Full, -Dev and -Fast.
SCHEDULES = {
    Variant.FULL: Schedule(UNIPC, shift=3.0, num_inference_steps=50, guidance_scale=5.0),
    Variant.DEV: Schedule(FLOW_MATCH_LCM, shift=6.0, num_inference_steps=28, guidance_scale=0.0),
    Variant.FAST: Schedule(FLOW_MATCH_LCM, shift=3.0, num_inference_steps=16, guidance_scale=0.0),
}


def identify_variant(scheduler_name: str, shift: float) -> Variant:
    """The variant that is sampled with this scheduler and shift."""
    for variant, schedule in SCHEDULES.items():
        if (schedule.scheduler_name, schedule.shift) == (scheduler_name, shift):
            return variant
    return Variant.CUSTOM


def default_schedule(scheduler_name: str, shift: float) -> Schedule:
    """Steps and guidance to sample with where a request names none.

    A custom checkpoint that is sampled by LCM counts as distilled, like Dev; any other counts as Full.
    """
    variant = identify_variant(scheduler_name, shift)
    if variant is Variant.CUSTOM:
        variant = Variant.DEV if scheduler_name == FLOW_MATCH_LCM else Variant.FULL
    nearest = SCHEDULES[variant]
    return Schedule(scheduler_name, shift, nearest.num_inference_steps, nearest.guidance_scale)
