"""An image that is decoded in slices is the library's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hidream_grpc.model.vae import ImageDecoding
from tests.autoencoders import latents_of, small_vae

VAES: dict[str, dict[str, object]] = {
    "as released": {"mid_block_add_attention": True, "use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False, "use_post_quant_conv": False},
    "post_quant_conv": {"mid_block_add_attention": False, "use_post_quant_conv": True},
    "attention and post_quant_conv": {"mid_block_add_attention": True, "use_post_quant_conv": True},
    "no shift": {"shift_factor": None},
    "blocks of another kind": {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D") * 2},
}
# Of the latents: square, both ways not square, as small as one token, odd.
SIZES = ((16, 16), (8, 24), (24, 8), (2, 2), (7, 5))


def decoded_by_the_library(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """(1, 3, H, W), -1 to 1 where nothing was clipped, as `HiDreamImagePipeline.__call__` has it."""
    with torch.inference_mode():
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(latents, return_dict=False)[0]


def as_pixels(sample: Tensor) -> NDArray[np.uint8]:
    image = (sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    return (image.numpy() * 255).round().astype(np.uint8)


def run_to_the_end(decoding: ImageDecoding) -> int:
    num_slices = 0
    while not decoding.is_finished:
        decoding.advance()
        num_slices += 1
    return num_slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", VAES)
def test_slices_decode_what_the_library_decodes_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    vae = small_vae(dtype, **VAES[kind])
    for size in SIZES:
        latents = latents_of(vae, size)
        expected = decoded_by_the_library(vae, latents)
        decoding = ImageDecoding(vae, latents)
        run_to_the_end(decoding)
        assert torch.equal(decoding._sample, expected), size
        assert np.array_equal(decoding.pixels(), as_pixels(expected)), size
        assert decoding.pixels().shape == (8 * size[0], 8 * size[1], 3)


def test_images_that_are_decoded_in_turns_do_not_mix() -> None:
    vae = small_vae()
    both = [latents_of(vae, size) for size in ((8, 8), (8, 16))]
    decodings = [ImageDecoding(vae, latents) for latents in both]
    while not all(decoding.is_finished for decoding in decodings):
        for decoding in decodings:
            decoding.advance()
    for decoding, latents in zip(decodings, both, strict=True):
        assert np.array_equal(decoding.pixels(), as_pixels(decoded_by_the_library(vae, latents)))


def test_steps_that_follow_do_not_change_an_image_that_is_being_decoded() -> None:
    vae = small_vae()
    latents = latents_of(vae, (8, 8))
    expected = as_pixels(decoded_by_the_library(vae, latents))
    decoding = ImageDecoding(vae, latents)
    latents.zero_()
    run_to_the_end(decoding)
    assert np.array_equal(decoding.pixels(), expected)


def test_no_slice_of_the_released_autoencoder_is_more_than_an_eighth_of_its_work() -> None:
    # On the meta device: shapes alone, with torch's own counter.
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        decoding = ImageDecoding(vae, torch.empty(1, 16, 128, 128))
    teraflops: list[float] = []
    while not decoding.is_finished:
        with FlopCounterMode(display=False) as counter:
            decoding.advance()
        teraflops.append(counter.get_total_flops() / 1e12)
    assert sum(teraflops) == pytest.approx(10.47, abs=0.01)
    assert max(teraflops) == pytest.approx(1.24, abs=0.01)
    assert len(teraflops) == decoding.num_slices


def test_an_image_has_no_pixels_before_its_last_slice_and_no_slice_after_it() -> None:
    vae = small_vae()
    decoding = ImageDecoding(vae, latents_of(vae, (2, 2)))
    for _ in range(decoding.num_slices - 1):
        decoding.advance()
    with pytest.raises(ValueError, match=rf"{decoding.num_slices - 1} of {decoding.num_slices} slices"):
        decoding.pixels()
    decoding.advance()
    with pytest.raises(IndexError):
        decoding.advance()
