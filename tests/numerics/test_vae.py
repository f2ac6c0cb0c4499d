"""An image that is decoded in slices is the library's: bit for bit, but for bands of odd sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hidream_grpc.model.decoding.vae import ImageDecoding, decode_in_slices
from tests.support.autoencoders import latents_of, small_vae

VAES: dict[str, dict[str, object]] = {
    "as released": {"mid_block_add_attention": True, "use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False, "use_post_quant_conv": False},
    "post_quant_conv": {"mid_block_add_attention": False, "use_post_quant_conv": True},
    "attention and post_quant_conv": {"mid_block_add_attention": True, "use_post_quant_conv": True},
    "no shift": {"shift_factor": None},
    "blocks of another kind": {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D") * 2},
}
# Of the latents: square, both ways not square, as small as one token, odd; too small to be cut.
WHOLE_SIZES = ((16, 16), (8, 24), (24, 8), (2, 2), (7, 5))
# Large enough that convolutions run in bands and normalizations in chunks, and bands are of one size.
EVENLY_CUT_SIZES = ((48, 64), (64, 64))
# Rows that do not divide, and more bands than the latents have rows.
ODDLY_CUT_SIZES = ((46, 46), (33, 50), (3, 256))
# Of the largest value. Where bands differ, the convolution's kernel may take another order of sums.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def decoded_by_the_library(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """(1, 3, H, W), -1 to 1 where nothing was clipped, as `HiDreamImagePipeline.__call__` has it."""
    with torch.inference_mode():
        return vae.decode(unscaled(vae, latents), return_dict=False)[0]


def unscaled(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)


@torch.inference_mode()
def decoded_in_slices(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    def keep_result() -> Iterator[None]:
        results.append((yield from decode_in_slices(vae, unscaled(vae, latents))))

    results: list[Tensor] = []
    for _ in keep_result():
        pass
    return results[0]


def as_pixels(sample: Tensor) -> NDArray[np.uint8]:
    image = (sample[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).float()
    return (image.numpy() * 255).round().astype(np.uint8)


def run_to_the_end(decoding: ImageDecoding) -> int:
    num_slices = 0
    while not decoding.is_finished:
        decoding.advance()
        num_slices += 1
    return num_slices


SLOW_KINDS = {"attention and post_quant_conv", "blocks of another kind"}
CASES = [
    # Many CPUs take a minute in bfloat16 for what they do in seconds in float32.
    *(pytest.param(kind, torch.bfloat16, id=f"{kind}-bfloat16", marks=pytest.mark.long) for kind in VAES),
    *(
        pytest.param(
            kind,
            torch.float32,
            id=f"{kind}-float32",
            marks=[pytest.mark.long] if kind in SLOW_KINDS else [],
        )
        for kind in VAES
    ),
]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_slices_decode_what_the_library_decodes_bit_for_bit(
    kind: str, dtype: torch.dtype, is_long: bool
) -> None:
    vae = small_vae(dtype, **VAES[kind])
    # Attention over the pixels of a large image takes minutes.
    is_small = kind in ("no shift", "blocks of another kind")
    evenly_cut_sizes = EVENLY_CUT_SIZES if is_long else EVENLY_CUT_SIZES[:1]
    sizes = WHOLE_SIZES if is_small else (*WHOLE_SIZES, *evenly_cut_sizes)
    for size in sizes:
        latents = latents_of(vae, size)
        expected = decoded_by_the_library(vae, latents)
        assert torch.equal(decoded_in_slices(vae, latents), expected), size
        decoding = ImageDecoding(vae, latents)
        run_to_the_end(decoding)
        assert np.array_equal(decoding.pixels(), as_pixels(expected)), size
        assert decoding.pixels().shape == (8 * size[0], 8 * size[1], 3)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((torch.float32, size) for size in ODDLY_CUT_SIZES),
        (torch.bfloat16, ODDLY_CUT_SIZES[-1]),
        *(pytest.param(torch.bfloat16, size, marks=pytest.mark.long) for size in ODDLY_CUT_SIZES[:-1]),
    ],
)
def test_bands_of_odd_sizes_change_an_image_by_rounding_alone(
    dtype: torch.dtype, size: tuple[int, int]
) -> None:
    vae = small_vae(dtype)
    latents = latents_of(vae, size)
    expected = decoded_by_the_library(vae, latents)
    error = (decoded_in_slices(vae, latents) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCES[dtype]


def test_a_large_image_is_cut_finer_than_a_small_one() -> None:
    vae = small_vae()
    small, medium, large = (
        run_to_the_end(ImageDecoding(vae, latents_of(vae, size))) for size in ((16, 16), (32, 32), (64, 64))
    )
    assert small < medium < large


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


def test_no_slice_of_the_released_autoencoder_is_more_than_an_eighteenth_of_its_work() -> None:
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
        slices = decode_in_slices(vae, torch.empty(1, 16, 128, 128))
    teraflops: list[float] = []
    is_finished = False
    while not is_finished:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            is_finished = next(slices, "end") == "end"
        teraflops.append(counter.get_total_flops() / 1e12)
    # The library's 10.47, and 3 % for the rows that two bands read.
    assert sum(teraflops) == pytest.approx(10.75, abs=0.01)
    assert max(teraflops) == pytest.approx(0.584, abs=0.01)
    assert len(teraflops) == 285


def test_an_image_has_no_pixels_before_its_last_slice_and_no_slice_after_it() -> None:
    vae = small_vae()
    decoding = ImageDecoding(vae, latents_of(vae, (2, 2)))
    while not decoding.is_finished:
        with pytest.raises(ValueError, match="slices are left"):
            decoding.pixels()
        decoding.advance()
    assert decoding.pixels().shape == (16, 16, 3)
    with pytest.raises(IndexError):
        decoding.advance()
