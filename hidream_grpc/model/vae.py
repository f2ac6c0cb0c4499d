"""An image's latents to pixels in slices, so that a decoder need not run in one piece.

Legend of shapes: C latent channels; H and W are those of the latents, an eighth of the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.unets.unet_2d_blocks import UpDecoderBlock2D
from numpy.typing import NDArray
from torch import Tensor

_Slice = Callable[[Tensor], Tensor]


class ImageDecoding:
    """The decoding of one image, from its latents to its pixels, slice by slice.

    A slice is one module of the library's decoder, and they run in the library's order: the pixels
    are those of `AutoencoderKL.decode`, bit for bit. The largest slice of the released autoencoder at
    1024×1024 takes 1.2 TFLOP, the whole decoder 10, a denoising step of one sample 78.

    Args:
        vae: whose decoder runs.
        latents: (1, C, H, W), model dtype, on the decoder's device, as the scheduler has them; not
            changed, and not read again.

    Source: diffusers 0.42.1 autoencoder_kl.py `_decode`, vae.py `Decoder.forward`, and the forwards of
        its blocks in unet_2d_blocks.py.
    """

    def __init__(self, vae: AutoencoderKL, latents: Tensor) -> None:
        self._sample = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        self._slices = tuple(_decoder_slices(vae))
        self._num_done = 0

    @property
    def num_slices(self) -> int:
        """Calls of `advance` from the latents to the end."""
        return len(self._slices)

    @property
    def is_finished(self) -> bool:
        """Whether all slices are done."""
        return self._num_done == self.num_slices

    @torch.inference_mode()
    def advance(self) -> None:
        """Run the next slice; the device may still be at it on return.

        Raises:
            IndexError: there is none.
        """
        self._sample = self._slices[self._num_done](self._sample)
        self._num_done += 1

    @torch.inference_mode()
    def pixels(self) -> NDArray[np.uint8]:
        """The image.

        Returns:
            (8·H, 8·W, 3), RGB.

        Raises:
            ValueError: slices are left.
        """
        if not self.is_finished:
            raise ValueError(f"{self._num_done} of {self.num_slices} slices are done")
        image = (self._sample[0] * 0.5 + 0.5).clamp(0.0, 1.0).movedim(0, -1).float().cpu()
        pixels: NDArray[np.uint8] = (image * 255.0).round().to(torch.uint8).numpy()
        return pixels


def _decoder_slices(vae: AutoencoderKL) -> Iterator[_Slice]:
    decoder = vae.decoder
    if vae.post_quant_conv is not None:
        yield vae.post_quant_conv
    yield decoder.conv_in
    first, *others = decoder.mid_block.resnets
    yield _without_time(first)
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        if attention is not None:
            yield attention
        yield _without_time(resnet)
    for block in decoder.up_blocks:
        yield from _up_block_slices(block)
    yield decoder.conv_norm_out
    yield decoder.conv_act
    yield decoder.conv_out


def _up_block_slices(block: torch.nn.Module) -> Iterator[_Slice]:
    if not isinstance(block, UpDecoderBlock2D):
        # A block of another kind, which no released checkpoint has, in one piece.
        yield _without_time(block)
        return
    yield from map(_without_time, block.resnets)
    yield from block.upsamplers or ()


def _without_time(module: torch.nn.Module) -> _Slice:
    """A module that also takes the embedding of a timestep, which an autoencoder has none of."""
    return partial(module, temb=None)
