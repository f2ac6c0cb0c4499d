"""Drawing with a loaded model, in one process, as the ranks do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hidream_grpc.model.denoising.state import DenoisingState, StepBatch
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.pipeline import HiDreamModel


def parameters(prompt: str = "a red circle", **changes: object) -> GenerationParameters:
    """A request of few steps and a small square, with guidance, unless told otherwise."""
    values: dict[str, object] = {
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "seed": 7,
    }
    return GenerationParameters(prompt=prompt, **(values | changes))  # type: ignore[arg-type]


def take_step(model: HiDreamModel, states: Sequence[DenoisingState]) -> None:
    """One denoising step of all states in one forward."""
    batch = StepBatch.collect(states)
    model.advance(states, batch, model.predict(batch))


def denoise(model: HiDreamModel, request: GenerationParameters) -> DenoisingState:
    """Draw one request alone."""
    state = model.begin(request)
    while not is_denoised(state):
        take_step(model, [state])
    return state


def is_denoised(state: DenoisingState) -> bool:
    """Whether all steps are done."""
    return state.step == state.parameters.num_inference_steps


def decode(model: HiDreamModel, state: DenoisingState, image_index: int) -> NDArray[np.uint8]:
    """The pixels of one image, (height, width, 3), RGB, from all slices in one go."""
    decoding = model.start_decoding(state, image_index)
    while not decoding.is_finished:
        decoding.advance()
    return decoding.pixels()
