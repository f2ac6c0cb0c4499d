"""The demo model's autoencoder: an `AutoencoderKL` that starts nearly linear, and its training.

From diffusers' default start so small an autoencoder stalls at the mean image. It learns at once
when it starts as a linear map: residual branches at zero, downsamplers as 2x2 Haar transforms, and
the two GroupNorm + SiLU heads made linear by pairs of large constant channels that fix the group's
statistics.
"""

import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from scripts.demo_model.captions import COLOURS, sample_scene
from scripts.demo_model.checkpoints import load_state, rate_factor, save_state
from scripts.demo_model.scenes import draw

SCALING_FACTOR = 0.3611
SHIFT_FACTOR = 0.1159
LATENT_CHANNELS = 16
_CHANNELS = (16, 32, 48, 64)
_NORM_GROUPS = 4
_CONSTANT = 4.0
_HEAD_BIAS = 3.0
_LOG_VARIANCE = -4.0
# (drawn size, crop) in pixels; crops of large images teach edges as they look at large sizes.
_PICTURE_SIZES = ((96, 96), (128, 96), (128, 96), (256, 96), (256, 96), (384, 96))


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder that starts as a linear one."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=_NORM_GROUPS,
        sample_size=256,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if name.endswith("conv2"):
                module.weight.zero_()
                module.bias.zero_()
            if name.endswith("conv_shortcut"):
                _set_identity(module, range(module.in_channels))
        _start_encoder(vae.encoder)
        _start_decoder(vae.decoder)
    return vae


def _set_identity(convolution: Any, slots: Iterable[int], gain: float = 1.0) -> None:
    """Channel i of the input becomes channel slots[i] of the output, the kernel's centre alone."""
    convolution.weight.zero_()
    convolution.bias.zero_()
    middle = convolution.kernel_size[0] // 2
    for source, slot in enumerate(slots):
        if slot < convolution.out_channels:
            convolution.weight[slot, source, middle, middle] = gain


def _set_haar(convolution: Any, bands: list[tuple[int, int]]) -> None:
    """Output channel i is Haar band bands[i][1] (mean, column, row, diagonal) of channel bands[i][0]."""
    convolution.weight.zero_()
    convolution.bias.zero_()
    signs = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]])
    for target, (source, band) in enumerate(bands):
        convolution.weight[target, source, :2, :2] = signs[band] * (0.25 if band == 0 else 0.5)


def _signal_slots(channels: int) -> list[int]:
    """The channels before a GroupNorm head that carry signal; each group's last two are constant."""
    group = channels // _NORM_GROUPS
    return [slot for slot in range(channels) if slot % group < group - 2]


def _linearise_head(last_shortcut: Any, norm: Any) -> None:
    channels = norm.num_channels
    group = channels // _NORM_GROUPS
    for last in range(group - 1, channels, group):
        last_shortcut.bias[last - 1] = _CONSTANT
        last_shortcut.bias[last] = -_CONSTANT
    norm.weight.fill_(_CONSTANT * (2 / group) ** 0.5)
    norm.bias.fill_(_HEAD_BIAS)


def _start_encoder(encoder: Any) -> None:
    _set_identity(encoder.conv_in, range(3))
    colours = range(3)
    first = [(colour, band) for band in range(4) for colour in colours]
    means = [(channel, 0) for channel in range(12)]
    details = [(colour, band) for band in (1, 2, 3) for colour in colours]
    second = means + details + [(channel, band) for band in (1, 2) for channel in range(3, 9)]
    third = (
        [(channel, 0) for channel in range(32)] + details + [(4, 1), (4, 2), (7, 1), (7, 2), (13, 1), (16, 2)]
    )
    for block, bands, channels in zip(encoder.down_blocks, (first, second, third), _CHANNELS, strict=False):
        _set_haar(block.downsamplers[0].conv, bands[:channels])
    slots = _signal_slots(_CHANNELS[-1])
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    _set_identity(shortcut, slots[: shortcut.in_channels])
    _linearise_head(shortcut, encoder.conv_norm_out)
    head = encoder.conv_out
    head.weight.zero_()
    head.bias.zero_()
    head.bias[LATENT_CHANNELS:] = _LOG_VARIANCE
    # Means of red, green, blue; their gradients at the coarsest level; four finer gradients of green.
    kept = [0, 1, 2, *range(32, 41), 13, 16, 4, 7]
    gains = [3.0] * 3 + [5.0] * 9 + [7.0] * 4
    for latent, (channel, gain) in enumerate(zip(kept, gains, strict=True)):
        head.weight[latent, slots[channel], 1, 1] = gain
        head.bias[latent] = -gain * _HEAD_BIAS


def _start_decoder(decoder: Any) -> None:
    slots = list(range(LATENT_CHANNELS))
    _set_identity(decoder.conv_in, slots, gain=1 / 3)
    smooth = torch.tensor([0.25, 0.5, 0.25])
    for block in decoder.up_blocks[:3]:
        convolution = block.upsamplers[0].conv
        convolution.weight.mul_(0.1)
        convolution.bias.zero_()
        for channel in range(convolution.out_channels):
            convolution.weight[channel, channel] += smooth[:, None] * smooth[None, :]
    shortcut = decoder.up_blocks[3].resnets[0].conv_shortcut
    _set_identity(shortcut, _signal_slots(_CHANNELS[0]))
    # Only as many channels as there are signal slots; the rest of the input starts unread.
    _linearise_head(shortcut, decoder.conv_norm_out)
    head = decoder.conv_out
    _set_identity(head, [])
    for colour in range(3):
        head.weight[colour, _signal_slots(_CHANNELS[0])[colour], 1, 1] = 1.0
        head.bias[colour] = -_HEAD_BIAS


def picture_batch(batch_size: int, rng: random.Random) -> Tensor:
    """(batch_size, 3, 96, 96) crops of drawn scenes, -1 to 1; one in three has random colours."""
    size, crop = rng.choice(_PICTURE_SIZES)
    images = torch.empty(batch_size, 3, crop, crop)
    for index in range(batch_size):
        palette = None
        if rng.random() < 0.33:
            palette = {name: (rng.randrange(256), rng.randrange(256), rng.randrange(256)) for name in COLOURS}
        top, left = rng.randint(0, size - crop), rng.randint(0, size - crop)
        whole = draw(sample_scene(rng, single_share=0.5), size, size, rng, palette)
        images[index] = torch.from_numpy(whole[:, top : top + crop, left : left + crop])
    return images


def vae_loss(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, and the mean square error of the reconstruction (-1 to 1 scale)."""
    latents = vae.encode(images).latent_dist.mean
    normalised = (latents - SHIFT_FACTOR) * SCALING_FACTOR
    noise_level = 0.12 * torch.rand(len(images), 1, 1, 1)
    noisy = normalised + noise_level * torch.randn_like(normalised)
    decoded = vae.decode(noisy / SCALING_FACTOR + SHIFT_FACTOR).sample
    error = decoded - images
    square = error.square().mean()
    mean = normalised.mean(dim=(0, 2, 3))
    deviation = normalised.std(dim=(0, 2, 3))
    moments = mean.square().mean() + (deviation - 1).square().mean()
    return error.abs().mean() + square + 0.02 * moments, square.detach()


def train_vae(folder: Path, num_steps: int, seed: int, batch_size: int = 16) -> AutoencoderKL:
    """Train the autoencoder, or go on where `folder` has a state; returns it in evaluation mode."""
    torch.manual_seed(seed)
    vae = new_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    state = load_state(folder / "vae.pt")
    step = 0
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    mean_square = 0.0
    while step < num_steps:
        rng = random.Random(f"{seed} vae {step}")
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate_factor(step / num_steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, square = vae_loss(vae, picture_batch(batch_size, rng))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mean_square += float(square)
        step += 1
        if step % 50 == 0:
            print(f"vae step {step} psnr {10 * math.log10(4 * 50 / mean_square):.2f} dB", flush=True)
            mean_square = 0.0
            save_state(
                folder / "vae.pt",
                {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
            )
    return vae.eval().requires_grad_(False)
