"""Decodes the latents of an image into pixels in slices, so that the decoder need not run in one piece.

Legend of shapes: C latent channels; H and W are those of the latents, an eighth of the image's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import pairwise

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from hidream_grpc.errors import NonFiniteError
from hidream_grpc.model.decoding.bands import num_bands
from hidream_grpc.model.diffusers_private import ResnetBlock2D, UpDecoderBlock2D, Upsample2D

Slices = Generator[None, None, Tensor]
"""A generator that stops after every slice of its work, and returns the result."""

_MAX_GROUP_CHUNKS = 4
"""Most chunks of channel groups in one normalization, which is a tenth of the work of a convolution."""


class ImageDecoding:
    """The decoding of one image, from its latents to its pixels, slice by slice.

    Args:
        vae: the autoencoder, of which the decoder runs.
        latents: (1, C, H, W), model dtype, on the decoder's device, as the scheduler has them; they are not
            changed, and read only here.
    """

    def __init__(self, vae: AutoencoderKL, latents: Tensor) -> None:
        sample = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        self._slices = self._decode(vae, sample)
        self._pixels: NDArray[np.uint8] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether all slices are done."""
        return self._pixels is not None

    @torch.inference_mode()
    def advance(self) -> None:
        """Run the next slice; the device may still be computing it on return.

        Raises:
            IndexError: no slice is left.
            NonFiniteError: this was the last slice, and some pixels are not finite.
        """
        if self.is_finished:
            raise IndexError("all slices are done")
        next(self._slices, None)

    def pixels(self) -> NDArray[np.uint8]:
        """The pixels of the image, once all slices are done.

        Returns:
            (8·H, 8·W, 3), RGB.

        Raises:
            ValueError: slices are left.
        """
        if self._pixels is None:
            raise ValueError("slices are left")
        return self._pixels

    def _decode(self, vae: AutoencoderKL, sample: Tensor) -> Iterator[None]:
        sample = yield from decode_in_slices(vae, sample)
        # The rest is the last slice.
        is_finite = sample.isfinite().all()
        image = (sample[0] * 0.5 + 0.5).clamp_(0.0, 1.0).float()
        pixels = image.mul_(255.0).round_().to(torch.uint8).cpu().movedim(0, -1).contiguous().numpy()
        # As pixels, NaN would become black and infinity white.
        if not is_finite:
            raise NonFiniteError("the pixels that the autoencoder gives are not finite")
        self._pixels = pixels


def decode_in_slices(vae: AutoencoderKL, sample: Tensor) -> Slices:
    """Compute what `AutoencoderKL.decode` does, by the same modules in the same order.

    Large convolutions run in bands of rows, each of which also reads the rows above and below it, and large
    normalizations run in chunks of whole groups, which are independent of each other. So every sum has the
    same terms; their order is up to the kernel.

    Args:
        vae: the autoencoder, of which the decoder runs.
        sample: (1, C, H, W), unscaled.

    Returns:
        A generator that returns (1, 3, 8·H, 8·W), -1 to 1 before clipping.

    Source: diffusers 0.42.1 autoencoder_kl.py `_decode`, vae.py `Decoder.forward`, and the forwards of
        its blocks in unet_2d_blocks.py.
    """
    for module in _modules_before_head(vae):
        sample = yield from _run(module, sample)
    decoder = vae.decoder
    sample = yield from _normalize(decoder.conv_norm_out, sample, in_place=True)
    head = nn.Sequential(decoder.conv_act, decoder.conv_out)
    return (yield from _run_in_bands(head, sample, decoder.conv_out.out_channels))


def _modules_before_head(vae: AutoencoderKL) -> Iterator[nn.Module]:
    decoder = vae.decoder
    if vae.post_quant_conv is not None:
        yield vae.post_quant_conv
    yield decoder.conv_in
    first, *others = decoder.mid_block.resnets
    yield first
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        if attention is not None:
            yield attention
        yield resnet
    for block in decoder.up_blocks:
        if isinstance(block, UpDecoderBlock2D):
            yield from block.resnets
            yield from block.upsamplers or ()
        else:
            # A block of another kind, which no released checkpoint has, runs in one piece.
            yield block


def _run(module: nn.Module, sample: Tensor) -> Slices:
    if isinstance(module, ResnetBlock2D):
        return (yield from _run_resnet(module, sample))
    if isinstance(module, Upsample2D):
        return (yield from _run_in_bands(module, sample, module.out_channels, scale=2))
    if isinstance(module, nn.Conv2d):
        return (yield from _run_in_bands(module, sample, module.out_channels))
    output: Tensor = module(sample)
    yield
    return output


def _run_resnet(resnet: ResnetBlock2D, sample: Tensor) -> Slices:
    """Run a block of an autoencoder, which neither resizes nor depends on timesteps.

    Source: diffusers 0.42.1 resnet.py `ResnetBlock2D.forward`.
    """
    hidden = yield from _normalize(resnet.norm1, sample, in_place=False)
    first = nn.Sequential(resnet.nonlinearity, resnet.conv1)
    hidden = yield from _run_in_bands(first, hidden, resnet.conv1.out_channels)
    hidden = yield from _normalize(resnet.norm2, hidden, in_place=True)
    second = nn.Sequential(resnet.nonlinearity, resnet.dropout, resnet.conv2)
    shortcut = nn.Identity() if resnet.conv_shortcut is None else resnet.conv_shortcut

    def add_shortcut(branch: Tensor, rows: slice) -> Tensor:
        output: Tensor = (shortcut(sample[:, :, rows]) + branch) / resnet.output_scale_factor
        return output

    return (yield from _run_in_bands(second, hidden, resnet.conv2.out_channels, ending=add_shortcut))


def _normalize(norm: nn.GroupNorm, sample: Tensor, *, in_place: bool) -> Slices:
    """Normalize some whole groups in each slice."""
    num_chunks = min(num_bands(sample.shape[2] * sample.shape[3], _MAX_GROUP_CHUNKS), norm.num_groups)
    if num_chunks == 1:
        whole: Tensor = norm(sample)
        yield
        return whole
    out = sample if in_place else torch.empty_like(sample)
    group_channels = norm.num_channels // norm.num_groups
    for first, end in _parts(norm.num_groups, num_chunks):
        channels = slice(first * group_channels, end * group_channels)
        out[:, channels] = functional.group_norm(
            sample[:, channels], end - first, norm.weight[channels], norm.bias[channels], norm.eps
        )
        yield
    return out


def _run_in_bands(
    module: nn.Module,
    sample: Tensor,
    num_channels: int,
    *,
    scale: int = 1,
    ending: Callable[[Tensor, slice], Tensor] | None = None,
) -> Slices:
    """Run a module whose output rows depend on the input rows at the same place and on their neighbours.

    Args:
        module: maps (1, c, rows, columns) to (1, num_channels, scale·rows, scale·columns).
        sample: input of the module.
        num_channels: channels of the output.
        scale: factor by which the module enlarges.
        ending: applied to each band of the output and its rows.

    Returns:
        A generator that returns the output.
    """
    _, _, num_rows, num_columns = sample.shape
    bands = min(num_bands(scale * num_rows * scale * num_columns), num_rows)
    if bands == 1:
        whole: Tensor = module(sample)
        whole = whole if ending is None else ending(whole, slice(None))
        yield
        return whole
    output = sample.new_empty(1, num_channels, scale * num_rows, scale * num_columns)
    for first, end in _parts(num_rows, bands):
        above, below = max(first - 1, 0), min(end + 1, num_rows)
        # The module pads with zeros: rightly at the edges of the image, elsewhere in rows that are dropped.
        band = module(sample[:, :, above:below])
        band = band[:, :, scale * (first - above) : scale * (end - above)]
        rows = slice(scale * first, scale * end)
        output[:, :, rows] = band if ending is None else ending(band, rows)
        yield
    return output


def _parts(length: int, num_parts: int) -> Iterator[tuple[int, int]]:
    """First and end index of each of some nearly equal parts."""
    return pairwise(length * part // num_parts for part in range(num_parts + 1))
