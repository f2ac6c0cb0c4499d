"""What a request gets does not depend on who else is in its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hidream_grpc.model.denoising.state import DenoisingState, StepBatch
from hidream_grpc.model.pipeline import HiDreamModel
from tests.numerics.conftest import LoadModel
from tests.support.denoising import decode, denoise, is_denoised, parameters, take_step

# float32, latents of magnitude 1: matrix products of other heights sum in another order.
BATCHING_TOLERANCE = 2e-5

VARIANTS = ["full", "dev", "fast"]


def assert_same(state: DenoisingState, expected: DenoisingState) -> None:
    torch.testing.assert_close(state.latents, expected.latents, rtol=0, atol=BATCHING_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)], ids=["square", "non-square"])
def test_a_request_in_a_mixed_batch_is_the_request_alone(
    variant: str, width: int, height: int, model_of: LoadModel
) -> None:
    model = model_of(variant)
    requests = [
        parameters("a red circle", width=width, height=height, num_inference_steps=6),
        parameters("two blue squares", width=width, height=height, guidance_scale=0.0, seed=8),
        parameters("a star", width=width, height=height, negative_prompt="red", num_images=2, seed=9),
    ]
    waiting = [model.begin(request) for request in requests]
    running: list[DenoisingState] = []
    finished = []
    while waiting or running:
        # One enters at each step, so all stand at different steps.
        running += waiting[:1]
        waiting = waiting[1:]
        assert len({state.step for state in running}) == len(running)
        take_step(model, running)
        finished += [state for state in running if is_denoised(state)]
        running = [state for state in running if not is_denoised(state)]
    assert len(finished) == len(requests)
    for state in finished:
        assert_same(state, denoise(model, state.parameters))


@pytest.mark.parametrize("variant", VARIANTS)
def test_image_i_of_a_request_is_what_seed_plus_i_draws_alone(variant: str, model_of: LoadModel) -> None:
    model = model_of(variant)
    together = denoise(model, parameters(num_images=3, seed=20))
    for index in range(3):
        alone = denoise(model, parameters(seed=20 + index))
        torch.testing.assert_close(together.latents[index], alone.latents[0], rtol=0, atol=BATCHING_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seed_draws_the_same_pixels_twice(variant: str, model_of: LoadModel) -> None:
    model: HiDreamModel = model_of(variant)
    request = parameters(num_images=2)
    first, second = denoise(model, request), denoise(model, request)
    for index in range(2):
        assert np.array_equal(decode(model, first, index), decode(model, second, index))
    assert model.preview(first) == model.preview(second)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"prompt": "a blue square"}, {"negative_prompt": "blue"}, {"guidance_scale": 2.0}],
    ids=lambda change: next(iter(change)),
)
def test_what_a_request_says_changes_the_picture(
    variant: str, change: dict[str, Any], model_of: LoadModel
) -> None:
    model = model_of(variant)
    difference = denoise(model, parameters()).latents - denoise(model, parameters(**change)).latents
    assert difference.abs().max() > 100 * BATCHING_TOLERANCE


def test_requests_of_two_sizes_are_refused_in_one_batch(model_of: LoadModel) -> None:
    model = model_of("full")
    with pytest.raises(ValueError, match="one size"):
        StepBatch.collect([model.begin(parameters()), model.begin(parameters(width=96))])


def test_a_size_between_two_tokens_is_refused_not_rounded(model_of: LoadModel) -> None:
    with pytest.raises(ValueError, match="multiples of 16, not 72 and 64"):
        model_of("full").begin(parameters(width=72))
