"""Muon for the matrices of the transformer's blocks, one batched orthogonalisation per shape."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def _orthogonalise(stacked: Tensor) -> Tensor:
    """(matrices, rows, columns) to their nearly orthogonal factors, by Newton-Schulz iterations."""
    is_tall = stacked.shape[1] > stacked.shape[2]
    matrices = stacked.transpose(1, 2) if is_tall else stacked
    matrices = matrices.bfloat16()
    matrices = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    first, second, third = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = matrices @ matrices.transpose(1, 2)
        matrices = first * matrices + (second * gram + third * gram @ gram) @ matrices
    return (matrices.transpose(1, 2) if is_tall else matrices).float()


class Muon:
    """Momentum whose updates are orthogonalised; parameters are grouped by shape."""

    def __init__(self, parameters: list[Tensor], learning_rate: float, momentum: float = 0.95) -> None:
        self.learning_rate = learning_rate
        self.momentum = momentum
        groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self._groups = list(groups.values())
        self._buffers = [torch.zeros(len(group), *group[0].shape) for group in self._groups]

    @torch.no_grad()
    def step(self, rate_factor: float) -> None:
        """Update every parameter from its gradient, at a share of the learning rate."""
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer.lerp_(gradients, 1 - self.momentum)
            update = _orthogonalise(gradients.lerp(buffer, self.momentum))
            rows, columns = group[0].shape
            scale = max(1.0, rows / columns) ** 0.5 * self.learning_rate * rate_factor
            torch._foreach_add_(group, list(update.unbind()), alpha=-scale)

    def state_dict(self) -> dict[str, Any]:
        """The momentum of every group."""
        return {"buffers": self._buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state_dict`."""
        self._buffers = state["buffers"]
