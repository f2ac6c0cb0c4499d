from __future__ import annotations

import pytest

from hidream_grpc.model.checkpoint.sizes import SUPPORTED_SIZES, TRAINED_SIZES, ImageSize, SizeLimits
from hidream_grpc.model.checkpoint.variants import Variant, default_schedule, identify_variant

REAL_MODEL = SizeLimits(size_multiple=16, max_pixels=1024 * 1024)


@pytest.mark.parametrize(
    ("width", "height", "is_allowed"),
    [
        (1024, 1024, True),
        (768, 1360, True),
        (64, 64, True),
        (64, 16384, True),
        (1040, 1024, False),
        (1016, 1024, False),
        (1024, 1016, False),
        (48, 1024, False),
        (0, 0, False),
        (-64, -64, False),
    ],
)
def test_a_size_is_allowed_when_its_tokens_fit(width: int, height: int, is_allowed: bool) -> None:
    assert REAL_MODEL.allows(ImageSize(width, height)) is is_allowed


def test_the_real_model_draws_the_seven_sizes_that_it_was_trained_for_and_more() -> None:
    sides = ((1024, 1024), (768, 1360), (1360, 768), (880, 1168), (1168, 880), (1248, 832), (832, 1248))
    assert REAL_MODEL.recommended() == TRAINED_SIZES == tuple(ImageSize(*size) for size in sides)
    assert REAL_MODEL.supported() == SUPPORTED_SIZES
    assert ImageSize(512, 512) in SUPPORTED_SIZES


def test_a_small_checkpoint_recommends_its_largest_square() -> None:
    small = SizeLimits(size_multiple=16, max_pixels=200 * 200)
    assert (small.recommended(), small.supported()) == ((ImageSize(192, 192),), ())


@pytest.mark.parametrize(
    ("scheduler", "shift", "variant"),
    [
        ("UniPCMultistepScheduler", 3.0, Variant.FULL),
        ("FlowMatchLCMScheduler", 6.0, Variant.DEV),
        ("FlowMatchLCMScheduler", 3.0, Variant.FAST),
        ("FlowMatchLCMScheduler", 4.0, Variant.CUSTOM),
        ("FlowMatchEulerDiscreteScheduler", 3.0, Variant.CUSTOM),
    ],
)
def test_scheduler_and_shift_tell_the_variant(scheduler: str, shift: float, variant: Variant) -> None:
    assert identify_variant(scheduler, shift) is variant


@pytest.mark.parametrize(
    ("scheduler", "shift", "needs_guidance"),
    [("UniPCMultistepScheduler", 3.0, True), ("FlowMatchLCMScheduler", 6.0, False)],
    ids=["full", "dev"],
)
def test_what_was_trained_with_guidance_needs_it(scheduler: str, shift: float, needs_guidance: bool) -> None:
    assert default_schedule(scheduler, shift).needs_guidance is needs_guidance


def test_a_distilled_checkpoint_of_another_shift_needs_no_guidance_either() -> None:
    schedule = default_schedule("FlowMatchLCMScheduler", 4.0)
    assert (schedule.shift, schedule.num_inference_steps, schedule.guidance_scale) == (4.0, 28, 0.0)
