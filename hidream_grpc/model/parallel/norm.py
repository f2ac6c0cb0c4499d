"""RMSNorm over channels that ranks divide. Independent of any model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parallel.shards import TensorSlice


class ParallelRMSNorm(nn.Module):
    """The weights of one RMSNorm; `rms_norms` applies it.

    Args:
        name: name in the checkpoint.
        channels: channels that this rank has.
        eps: number added to the mean square.
    """

    def __init__(self, name: str, channels: range, eps: float) -> None:
        super().__init__()
        self._name = name
        self._channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(len(channels)), requires_grad=False)

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """See `Sharded`."""
        return {"weight": (TensorSlice(f"{self._name}.weight", rows=self._channels),)}


def rms_norms(axis: Axis, width: int, pairs: Sequence[tuple[ParallelRMSNorm, Tensor]]) -> list[Tensor]:
    """Apply several norms, each to a tensor of its own, with one all-reduce for all mean squares.

    Args:
        axis: the ranks that divide the channels.
        width: channels of all ranks together.
        pairs: norm and (B, T, this rank's channels); B is common, T is not.

    Returns:
        For each pair a tensor of its shape and dtype; the mean is taken in float32 at least.

    Source: torch.nn.RMSNorm.
    """
    if axis.size == 1:
        return [functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) for norm, x in pairs]
    exact = [x.to(torch.promote_types(x.dtype, torch.float32)) for _, x in pairs]
    squares = torch.cat([x.square().sum(-1) for x in exact], dim=1)
    mean_squares = torch.split(axis.all_reduce(squares) / width, [x.shape[1] for x in exact], dim=1)
    return [
        (x * torch.rsqrt(mean[..., None] + norm.eps) * norm.weight).to(original.dtype)
        for (norm, original), x, mean in zip(pairs, exact, mean_squares, strict=True)
    ]
