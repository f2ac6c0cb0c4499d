from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import adaptive_avg_pool2d

from hidream_grpc.errors import NonFiniteError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.decoding.preview import LatentPreview


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(demo_checkpoint_path() / "vae").eval()


def scene() -> torch.Tensor:
    """(1, 3, 256, 256): a red disc and a yellow corner on blue."""
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    picture = torch.tensor([-0.8, -0.6, 0.9])[:, None, None].repeat(1, 256, 256)
    picture[:, (rows - 100) ** 2 + (columns - 150) ** 2 < 70**2] = torch.tensor([0.9, -0.7, -0.8])[:, None]
    picture[:, (rows > 200) & (columns < 60)] = torch.tensor([0.9, 0.9, 0.1])[:, None]
    return picture[None]


def test_a_preview_looks_like_the_picture(vae: AutoencoderKL) -> None:
    picture = scene()
    with torch.inference_mode():
        encoded = vae.encode(picture).latent_dist.mode()
    latents = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
    preview = LatentPreview.fit(vae).render(latents[0])
    assert preview.shape == (64, 64, 3)
    small = adaptive_avg_pool2d(picture[0], (64, 64)).movedim(0, -1).numpy() * 127.5 + 127.5
    for channel in range(3):
        assert np.corrcoef(preview[..., channel].ravel(), small[..., channel].ravel())[0, 1] > 0.9
    assert np.abs(preview - small).mean() < 20


@pytest.mark.parametrize(
    ("latents_size", "preview_size"),
    [
        ((128, 128), (128, 128)),
        ((96, 170), (72, 128)),
        ((64, 48), (64, 48)),
        ((32, 32), (64, 64)),
        ((8, 16), (32, 64)),
        ((2, 512), (1, 128)),
    ],
)
def test_a_preview_stays_within_its_limits_and_keeps_the_shape(
    latents_size: tuple[int, int], preview_size: tuple[int, int], vae: AutoencoderKL
) -> None:
    preview = LatentPreview.fit(vae).render(torch.zeros(16, *latents_size))
    assert preview.shape == (*preview_size, 3)


def test_the_fit_is_the_same_every_time(vae: AutoencoderKL) -> None:
    latents = torch.randn(16, 32, 32, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(LatentPreview.fit(vae).render(latents), LatentPreview.fit(vae).render(latents))


def test_an_autoencoder_that_gives_no_numbers_is_told_before_anything_is_drawn(vae: AutoencoderKL) -> None:
    broken = copy.deepcopy(vae)
    torch.nn.init.constant_(broken.decoder.conv_out.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="the autoencoder gives numbers that are not finite"):
        LatentPreview.fit(broken)
