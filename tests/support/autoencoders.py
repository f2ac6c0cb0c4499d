"""Small random autoencoders for tests, of the released one's class and kind."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def small_vae(dtype: torch.dtype = torch.float32, **changes: object) -> AutoencoderKL:
    """Four blocks as in the released autoencoder, with few channels, unless told otherwise."""
    values: dict[str, object] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 16, 32),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(**(values | changes)).to(dtype).eval()


def latents_of(vae: AutoencoderKL, size: tuple[int, int]) -> Tensor:
    """(1, 16, H, W), always the same ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 16, *size, generator=generator).to(vae.dtype)
