"""Scenes drawn and encoded once, so that a transformer step pays for the transformer alone."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.demo_model.captions import Scene, sample_scene
from scripts.demo_model.scenes import draw
from scripts.demo_model.vae import SCALING_FACTOR, SHIFT_FACTOR

VAE_FACTOR = 8
_BATCH_PIXELS = 16 * 128 * 128


@dataclass(frozen=True)
class PictureSize:
    """One image size, in pixels, and how many scenes of it to encode."""

    height: int
    width: int
    num_scenes: int

    @property
    def name(self) -> str:
        """The folder's name: height x width."""
        return f"{self.height}x{self.width}"


PICTURE_SIZES = (
    PictureSize(128, 128, 12_000),
    PictureSize(256, 256, 10_000),
    PictureSize(192, 256, 1_200),
    PictureSize(256, 192, 1_200),
    PictureSize(256, 384, 800),
    PictureSize(384, 256, 800),
    PictureSize(512, 512, 1_600),
)


@dataclass(frozen=True)
class EncodedScenes:
    """Scenes and their latents, (scenes, C, H / 8, W / 8), normalised as the transformer sees them."""

    scenes: list[Scene]
    latents: Tensor


def _scene_rng(seed: int, size: PictureSize, index: int) -> random.Random:
    return random.Random(f"{seed} scene {size.name} {index}")


def encode_scenes(folder: Path, vae: AutoencoderKL, size: PictureSize, seed: int) -> None:
    """Write the latents of one size to `folder`, unless they are there."""
    path = folder / f"latents_{size.name}.npy"
    if path.exists():
        return
    batch_size = max(1, _BATCH_PIXELS // (size.height * size.width))
    batches = []
    for start in range(0, size.num_scenes, batch_size):
        images = []
        for index in range(start, min(start + batch_size, size.num_scenes)):
            rng = _scene_rng(seed, size, index)
            images.append(draw(sample_scene(rng), size.height, size.width, rng))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(torch.from_numpy(np.stack(images))).latent_dist.mean.float()
        batches.append(((latents - SHIFT_FACTOR) * SCALING_FACTOR).half().numpy())
    partial = path.with_suffix(".partial.npy")
    np.save(partial, np.concatenate(batches))
    partial.replace(path)


def load_scenes(folder: Path, size: PictureSize, seed: int) -> EncodedScenes:
    """Read what `encode_scenes` wrote; processes share the memory of the latents."""
    latents = np.load(folder / f"latents_{size.name}.npy", mmap_mode="c")
    scenes = [sample_scene(_scene_rng(seed, size, index)) for index in range(len(latents))]
    return EncodedScenes(scenes, torch.from_numpy(latents))
