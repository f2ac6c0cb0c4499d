"""Exchanges around attention over tokens that ranks divide: in it each rank has all tokens of some heads.

Legend: B samples, H heads, C channels of a head, P ranks of the axis, each with an own number of tokens.

Source: DeepSpeed Ulysses (Jacobs et al. 2023, arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hidream_grpc.model.parallel.groups import Axis


def gather_tokens(axis: Axis, tensors: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Exchange tokens for heads, in one collective for several tensors.

    Args:
        axis: the ranks that divide the tokens.
        tensors: each (B, tokens of this rank, H, C); P divides H.
        counts: for each tensor the numbers of tokens of all ranks.

    Returns:
        For each tensor (B, tokens of all ranks in the order of the axis, H / P, C); rank p gets the p-th part
        of the heads.

    Raises:
        CollectiveError: a rank is gone.
    """
    if axis.size == 1:
        return list(tensors)
    own = torch.cat(tuple(tensors), dim=1)
    batch, num_own, num_heads, channels = own.shape
    by_rank = own.view(batch, num_own, axis.size, num_heads // axis.size, channels).permute(2, 1, 0, 3, 4)
    counts_of_ranks = list(zip(*counts, strict=True))
    received = axis.all_to_all(
        by_rank.flatten(0, 1), [num_own] * axis.size, [sum(of_rank) for of_rank in counts_of_ranks]
    )
    pieces = torch.split(received, [count for of_rank in counts_of_ranks for count in of_rank])
    return [
        torch.cat([piece.transpose(0, 1) for piece in pieces[index :: len(tensors)]], dim=1)
        for index in range(len(tensors))
    ]


def scatter_tokens(axis: Axis, tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """Exchange heads for tokens, the inverse of `gather_tokens`.

    Args:
        axis: the ranks that divide the tokens.
        tensor: (B, tokens of all ranks, H / P, C).
        counts: the numbers of tokens of all ranks.

    Returns:
        (B, tokens of this rank, H, C).

    Raises:
        CollectiveError: a rank is gone.
    """
    if axis.size == 1:
        return tensor
    num_own = counts[axis.index]
    received = axis.all_to_all(tensor.transpose(0, 1).contiguous(), counts, [num_own] * axis.size)
    by_rank = received.view(axis.size, num_own, *received.shape[1:])
    return by_rank.permute(2, 1, 0, 3, 4).flatten(2, 3)
