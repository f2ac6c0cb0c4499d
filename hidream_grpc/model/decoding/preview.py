"""A preview of latents for the cost of one small matrix product."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from hidream_grpc.errors import NonFiniteError
from hidream_grpc.model.checkpoint.sizes import MAX_PREVIEW_SIDE_PIXELS, MIN_PREVIEW_SIDE_PIXELS

_NUM_SAMPLE_IMAGES = 8
_SAMPLE_SIDE_PIXELS = 32


class LatentPreview:
    """A linear map from latents to RGB, fitted to one checkpoint's own autoencoder."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = weight
        self._bias = bias

    @classmethod
    @torch.inference_mode()
    def fit(cls, vae: AutoencoderKL) -> LatentPreview:
        """Find, by least squares, the colour that the autoencoder gives to a latent pixel.

        The map is fitted to colourful images that are generated here, encoded and decoded.

        Args:
            vae: autoencoder of the checkpoint; it is run once each way.

        Raises:
            NonFiniteError: the autoencoder returns numbers that are not finite.
        """
        images = _colourful_images().to(vae.device, vae.dtype)
        encoded = vae.encode(images).latent_dist.mode()
        decoded = vae.decode(encoded, return_dict=False)[0].clamp(-1.0, 1.0)
        colours = adaptive_avg_pool2d(decoded, tuple(encoded.shape[-2:]))
        latents = (encoded - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        inputs = latents.movedim(1, -1).flatten(0, -2).double().cpu()
        targets = colours.movedim(1, -1).flatten(0, -2).double().cpu()
        if not (inputs.isfinite().all() and targets.isfinite().all()):
            raise NonFiniteError("the autoencoder gives numbers that are not finite")
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
        # gelsd gives the smallest solution where latent channels depend on each other.
        solution = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.float()
        return cls(weight=solution[:-1].to(vae.device), bias=solution[-1].to(vae.device))

    @torch.inference_mode()
    def render(self, latents: Tensor) -> NDArray[np.uint8]:
        """Turn the latents of one image into the pixels of a preview.

        Args:
            latents: (16, H/8, W/8), as the scheduler has them.

        Returns:
            (h, w, 3), RGB; the longer side is within the limits of previews.
        """
        colours = torch.einsum("chw,cr->rhw", latents.float(), self._weight) + self._bias[:, None, None]
        pixels = ((colours + 1.0) * 127.5).clamp(0.0, 255.0)
        longer_side = max(pixels.shape[-2:])
        shown_side = min(max(longer_side, MIN_PREVIEW_SIDE_PIXELS), MAX_PREVIEW_SIDE_PIXELS)
        if shown_side != longer_side:
            size = [max(1, side * shown_side // longer_side) for side in pixels.shape[-2:]]
            pixels = interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]
        shown: NDArray[np.uint8] = pixels.round().to(torch.uint8).movedim(0, -1).cpu().numpy()
        return shown


def _colourful_images() -> Tensor:
    """Generate smooth images of random colours, always the same ones.

    Returns:
        (N, 3, S, S), float32, -1 to 1.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_NUM_SAMPLE_IMAGES, 3, 4, 4, generator=generator) * 2.0 - 1.0
    size = [_SAMPLE_SIDE_PIXELS, _SAMPLE_SIDE_PIXELS]
    return interpolate(coarse, size=size, mode="bilinear", align_corners=True)
