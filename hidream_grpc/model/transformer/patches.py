"""Turns latents into tokens and back, and computes the positions of the tokens.

Legend: B samples, N image tokens (with the padding token, if any, which is the first), T text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hidream_grpc.model.diffusers_private import HiDreamImageEmbedND


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The tokens of latents of one size, and of their text.

    Attributes:
        rows, columns: numbers of patches.
        padding_count: how many padding tokens the first token stands for; 0 where it is an image token.
        cosines, sines: (N + T, half the channels of a head that are rotated), float32.
    """

    rows: int
    columns: int
    padding_count: int
    cosines: Tensor
    sines: Tensor

    @classmethod
    def new(
        cls,
        rows: int,
        columns: int,
        num_text_tokens: int,
        max_tokens: int,
        rotary_embedding: HiDreamImageEmbedND,
        device: torch.device,
    ) -> TokenGrid:
        """Compute the grid of one size.

        Padding and text have position 0. Only latents that are not square are padded.

        Source: diffusers 0.42.1 transformer_hidream_image.py, patchify and rope.
        """
        padding_count = 0 if rows == columns else max_tokens - rows * columns
        num_before = 1 if padding_count else 0
        positions = torch.zeros(1, num_before + rows * columns + num_text_tokens, 3)
        of_image = positions[0, num_before : num_before + rows * columns].view(rows, columns, 3)
        of_image[..., 1] = torch.arange(rows)[:, None]
        of_image[..., 2] = torch.arange(columns)[None, :]
        rotation = rotary_embedding(positions)[0, :, 0].to(device)
        return cls(
            rows=rows,
            columns=columns,
            padding_count=padding_count,
            cosines=rotation[..., 0, 0].contiguous(),
            sines=rotation[..., 1, 0].contiguous(),
        )


def patchify(latents: Tensor, patch_size: int, grid: TokenGrid) -> Tensor:
    """Map (B, C, height, width) to (B, N, patch size² × C); a padding token is all zeros."""
    batch, channels = latents.shape[:2]
    patches = latents.reshape(batch, channels, grid.rows, patch_size, grid.columns, patch_size)
    tokens = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid.rows * grid.columns, -1)
    return functional.pad(tokens, (0, 0, 1, 0)) if grid.padding_count else tokens


def unpatchify(tokens: Tensor, patch_size: int, grid: TokenGrid) -> Tensor:
    """Map (B, N, patch size² × C) to (B, C, height, width); a padding token is dropped."""
    if grid.padding_count:
        tokens = tokens[:, 1:].contiguous()
    patches = tokens.view(tokens.shape[0], grid.rows, grid.columns, patch_size, patch_size, -1)
    latents = patches.permute(0, 5, 1, 3, 2, 4)
    return latents.reshape(tokens.shape[0], -1, grid.rows * patch_size, grid.columns * patch_size)
