"""Turns latents into tokens and back, and computes the positions of the tokens.

Legend: B samples, N image tokens (with the padding token, if any, which is the first), T text tokens that
go from block to block, L tokens of Llama that a block appends; of each of these three the ranks of the
sequence axis have a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hidream_grpc.model.diffusers_private import HiDreamImageEmbedND
from hidream_grpc.model.parallel.groups import Axis


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """The tokens of latents of one size, and of their text, as one rank sees them.

    Attributes:
        rows, columns: numbers of patches.
        padding_count: how many padding tokens the first token stands for; 0 where it is an image token.
        num_image_tokens: N.
        image, text, llama: the tokens of each that this rank has.
        query_counts, key_counts: for each rank of the sequence axis, how many tokens it has that ask in
            attention, and how many that answer.
        cosines, sines: (tokens of this rank, half the channels of a head that are rotated), float32.
    """

    rows: int
    columns: int
    padding_count: int
    num_image_tokens: int
    image: range
    text: range
    llama: range
    query_counts: tuple[int, ...]
    key_counts: tuple[int, ...]
    cosines: Tensor
    sines: Tensor

    @property
    def has_padding_token(self) -> bool:
        """Whether the first token of this rank is the padding token."""
        return self.padding_count > 0 and 0 in self.image

    @classmethod
    def new(
        cls,
        rows: int,
        columns: int,
        num_text_tokens: int,
        num_llama_tokens: int,
        max_tokens: int,
        axis: Axis,
        rotary_embedding: HiDreamImageEmbedND,
        device: torch.device,
    ) -> TokenGrid:
        """Compute the grid of one size.

        Padding and text have position 0. Only latents that are not square are padded.

        Source: diffusers 0.42.1 transformer_hidream_image.py, patchify and rope.
        """
        padding_count = 0 if rows == columns else max_tokens - rows * columns
        num_before = 1 if padding_count else 0
        num_image_tokens = num_before + rows * columns
        streams = num_image_tokens, num_text_tokens, num_llama_tokens
        counts = [tuple(len(part) for part in axis.shares(num_tokens)) for num_tokens in streams]
        image, text, llama = (axis.share(num_tokens) for num_tokens in streams)
        of_image = torch.zeros(num_image_tokens, 3)
        patches = of_image[num_before:].view(rows, columns, 3)
        patches[..., 1] = torch.arange(rows)[:, None]
        patches[..., 2] = torch.arange(columns)[None, :]
        positions = functional.pad(of_image[image.start : image.stop], (0, 0, 0, len(text) + len(llama)))
        rotation = rotary_embedding(positions[None])[0, :, 0].to(device)
        return cls(
            rows=rows,
            columns=columns,
            padding_count=padding_count,
            num_image_tokens=num_image_tokens,
            image=image,
            text=text,
            llama=llama,
            query_counts=tuple(map(sum, zip(*counts[:2], strict=True))),
            key_counts=tuple(map(sum, zip(*counts, strict=True))),
            cosines=rotation[..., 0, 0].contiguous(),
            sines=rotation[..., 1, 0].contiguous(),
        )


def patchify(latents: Tensor, patch_size: int, grid: TokenGrid) -> Tensor:
    """Map (B, C, height, width) to (B, this rank's image tokens, patch size² × C); padding is all zeros."""
    batch, channels = latents.shape[:2]
    patches = latents.reshape(batch, channels, grid.rows, patch_size, grid.columns, patch_size)
    tokens = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid.rows * grid.columns, -1)
    if grid.padding_count:
        tokens = functional.pad(tokens, (0, 0, 1, 0))
    return tokens[:, grid.image.start : grid.image.stop]


def unpatchify(tokens: Tensor, patch_size: int, grid: TokenGrid) -> Tensor:
    """Map (B, N, patch size² × C) to (B, C, height, width); a padding token is dropped."""
    if grid.padding_count:
        tokens = tokens[:, 1:].contiguous()
    patches = tokens.view(tokens.shape[0], grid.rows, grid.columns, patch_size, patch_size, -1)
    latents = patches.permute(0, 5, 1, 3, 2, 4)
    return latents.reshape(tokens.shape[0], -1, grid.rows * patch_size, grid.columns * patch_size)
