"""Our loop on the pipeline's parts draws what the library's own pipeline draws."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HiDreamImagePipeline
from diffusers.schedulers import scheduling_flow_match_lcm

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.devices.device import open_device
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.prompt_lengths import PROMPT_TOKEN_BUCKETS
from hidream_grpc.model.denoising.state import DenoisingState
from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parameters import GenerationParameters, PaddedPrompt
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.prompts.text_encoders import PromptEmbeds, TextEncoders
from tests.numerics.conftest import LoadModel
from tests.support.checkpoints import LLAMA_LAYERS_READ, write_unlimited_t5
from tests.support.denoising import decode, denoise, parameters

# float32, latents of magnitude 1. The loops differ in nothing but the order of some sums: the pipeline
# runs Llama's attention in another kernel, to get attention maps that it then throws away.
LATENT_TOLERANCE = 3e-5

CheckpointOf = Callable[[str], Path]


@cache
def loaded_pipeline(folder: Path, dtype: torch.dtype) -> HiDreamImagePipeline:
    pipeline = HiDreamImagePipeline.from_pretrained(folder, local_files_only=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_pipeline(
    folder: Path, width: int, height: int, dtype: torch.dtype = torch.float32
) -> HiDreamImagePipeline:
    # A call leaves behind what the scheduler remembers, and nothing else.
    pipeline = loaded_pipeline(folder, dtype)
    pipeline.register_modules(scheduler=pipeline.scheduler.from_config(pipeline.scheduler.config))
    # The pipeline scales every size to this square's area; of this area it leaves the size alone.
    side = round((width * height) ** 0.5)
    assert side * side == width * height
    pipeline.default_sample_size = side // pipeline.vae_scale_factor
    return pipeline


def run_pipeline(
    folder: Path, request: GenerationParameters, initial: DenoisingState, output_type: str = "latent"
) -> torch.Tensor | np.ndarray:
    pipeline = load_pipeline(folder, request.width, request.height, initial.latents.dtype)
    return pipeline(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=request.num_images,
        latents=initial.latents.clone(),
        output_type=output_type,
        max_sequence_length=request.prompt_tokens,
    ).images


# What a scheduler does depends on the size and on the steps.
REQUESTS_FOR_EVERY_SCHEDULER = {
    "square": parameters(),
    "non-square, padded": parameters(width=128, height=32),
    "one step": parameters(num_inference_steps=1),
    "many steps": parameters(num_inference_steps=20),
}
OTHER_REQUESTS = {
    "negative prompt, two images": parameters(negative_prompt="blue", num_images=2),
    "no guidance": parameters(guidance_scale=1.0),
    "long prompt": parameters("a red circle " * 8, prompt_tokens=192),
    "longest prompt, padded": parameters("a red circle " * 12, prompt_tokens=256, width=128, height=32),
}


@pytest.mark.parametrize(
    ("scheduler", "request_"),
    [
        pytest.param(
            scheduler,
            request,
            id=f"{name}-{scheduler}",
            marks=pytest.mark.long if name in OTHER_REQUESTS and scheduler != "full" else [],
        )
        for name, request in (REQUESTS_FOR_EVERY_SCHEDULER | OTHER_REQUESTS).items()
        for scheduler in ("full", "euler", "euler_dynamic")
    ],
)
def test_same_latents_give_the_pipelines_picture(
    scheduler: str, request_: GenerationParameters, model_of: LoadModel, checkpoint_of: CheckpointOf
) -> None:
    model = model_of(scheduler)
    expected = run_pipeline(checkpoint_of(scheduler), request_, model.begin(request_))
    state = denoise(model, request_)
    assert state.latents.shape[-2:] == (request_.height // 8, request_.width // 8)
    torch.testing.assert_close(state.latents, expected, rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("scheduler", ["dev", "fast"])
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
def test_distilled_variants_give_the_pipelines_picture_for_the_same_noise(
    scheduler: str,
    guidance_scale: float,
    model_of: LoadModel,
    checkpoint_of: CheckpointOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(scheduler)
    request = parameters(num_inference_steps=6, guidance_scale=guidance_scale)
    initial = model.begin(request)
    with monkeypatch.context() as patch:
        # The pipeline gives the scheduler no generator; here it draws from the image's own.
        library_randn = scheduling_flow_match_lcm.randn_tensor
        patch.setattr(
            scheduling_flow_match_lcm,
            "randn_tensor",
            lambda *args, **kwargs: library_randn(*args, **kwargs | {"generator": list(initial.generators)}),
        )
        expected = run_pipeline(checkpoint_of(scheduler), request, initial)
    torch.testing.assert_close(denoise(model, request).latents, expected, rtol=0, atol=LATENT_TOLERANCE)


def test_seeds_mean_what_they_mean_to_the_pipeline(model_of: LoadModel, checkpoint_of: CheckpointOf) -> None:
    request = parameters(num_images=2, seed=41)
    pipeline = load_pipeline(checkpoint_of("full"), request.width, request.height)
    generators = [torch.Generator().manual_seed(seed) for seed in (41, 42)]
    expected = pipeline.prepare_latents(
        2, 16, request.height, request.width, torch.float32, "cpu", generators
    )
    assert torch.equal(model_of("full").begin(request).latents, expected)


@pytest.fixture(scope="module")
def encoders_and_pipeline(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TextEncoders, HiDreamImagePipeline]:
    """The encoders of a checkpoint whose T5 and Llama have no limit, and CLIP that of the pipeline."""
    folder = write_unlimited_t5(tiny_checkpoint, tmp_path_factory.mktemp("long") / "checkpoint")
    world, device = Axis("world"), open_device("cpu", 0)
    encoders = TextEncoders.from_pretrained(folder, None, LLAMA_LAYERS_READ, device, world)
    return encoders, load_pipeline(folder, 64, 64)


# As the pipeline's own call has it: with gradients attention runs in another kernel, of other rounding.
@torch.no_grad()
@pytest.mark.parametrize("num_tokens", PROMPT_TOKEN_BUCKETS)
@pytest.mark.parametrize("text", ["", "a red circle", "红色的圆 on blue", "word " * 37, "word " * 100])
def test_prompts_are_encoded_as_the_pipeline_does(
    text: str, num_tokens: int, encoders_and_pipeline: tuple[TextEncoders, HiDreamImagePipeline]
) -> None:
    encoders, pipeline = encoders_and_pipeline
    t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=num_tokens
    )
    embeds = PromptEmbeds.from_outputs(encoders.encode(PaddedPrompt(text, num_tokens)))
    assert embeds.t5.shape[0] == embeds.llama.shape[1] == num_tokens
    torch.testing.assert_close(embeds.t5, t5[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(embeds.llama, llama[list(LLAMA_LAYERS_READ), 0], rtol=0, atol=1e-5)
    # Sums of float32 are rounded by the addresses of their operands, too.
    torch.testing.assert_close(embeds.pooled, pooled[0], rtol=1e-6, atol=1e-6)


def test_the_same_latents_decode_to_the_pipelines_pixels_exactly(
    model_of: LoadModel, checkpoint_of: CheckpointOf
) -> None:
    model = model_of("full")
    request = parameters(width=128, height=32)
    state = denoise(model, request)
    pipeline = load_pipeline(checkpoint_of("full"), request.width, request.height)
    with torch.no_grad():
        latents = state.latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        image = pipeline.image_processor.postprocess(pipeline.vae.decode(latents, return_dict=False)[0])[0]
    pixels = decode(model, state, 0)
    assert pixels.shape == (32, 128, 3)
    assert np.array_equal(pixels, np.asarray(image))


def test_pixels_are_the_pipelines_within_one_level(model_of: LoadModel, checkpoint_of: CheckpointOf) -> None:
    model: HiDreamModel = model_of("full")
    request = parameters(num_inference_steps=10, width=128, height=128)
    image = run_pipeline(checkpoint_of("full"), request, model.begin(request), "pil")[0]
    difference = np.asarray(image).astype(int) - decode(model, denoise(model, request), 0)
    assert np.abs(difference).max() <= 1


def test_the_demo_checkpoint_draws_the_pipelines_picture() -> None:
    folder = demo_checkpoint_path()
    model = HiDreamModel.from_pretrained(folder, None, open_device("cpu", 0))
    request = parameters("a red circle on a blue background", width=128, height=128)
    expected = run_pipeline(folder, request, model.begin(request))
    torch.testing.assert_close(denoise(model, request).latents, expected, rtol=0, atol=LATENT_TOLERANCE)


class HalfPrecisionCpu(CpuDevice):
    """What an accelerator computes in, where no accelerator is."""

    dtype = torch.bfloat16


@pytest.mark.parametrize("scheduler", ["full", "euler"])
def test_in_bfloat16_the_picture_is_the_pipelines_too(scheduler: str, checkpoint_of: CheckpointOf) -> None:
    folder = checkpoint_of(scheduler)
    model = HiDreamModel.from_pretrained(folder, None, HalfPrecisionCpu())
    request = parameters()
    initial = model.begin(request)
    assert initial.latents.dtype == torch.bfloat16
    expected = run_pipeline(folder, request, initial)
    state = denoise(model, request)
    assert state.latents.dtype == torch.bfloat16
    # A value has steps of 2^-8 to 2^-7 of itself, and the last ones of many roundings differ.
    torch.testing.assert_close(state.latents, expected, rtol=2**-7, atol=0.05)
    assert decode(model, state, 0).shape == (64, 64, 3)
    assert model.preview(state)


def test_in_bfloat16_distilled_variants_keep_their_dtype(checkpoint_of: CheckpointOf) -> None:
    model = HiDreamModel.from_pretrained(checkpoint_of("dev"), None, HalfPrecisionCpu())
    assert denoise(model, parameters()).latents.dtype == torch.bfloat16
