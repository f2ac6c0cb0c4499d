"""The matrices of layers, exact or quantized, of which a rank holds a share. Independent of any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hidream_grpc.devices.device import Device
from hidream_grpc.model.parallel.shards import TensorSlice

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]


class Matrix(nn.Module):
    """The matrix of one layer, or of several with one input; those of G groups have the same shape.

    It is exact unless its share is loaded quantized. One scale belongs to an output channel of the whole
    matrix, also where a rank holds some of its inputs: so every layout has the weights of one device.

    Attributes:
        weight: (N, K) or (G, N, K), exact or quantized.
        scales: (N,) or (G, N), of quantized weights; None of exact ones.
        exact: (M, K), the last rows, which stay exact where the others are quantized; None where there are
            none.

    Args:
        slices: the slices that form it, one below another.
        shape: (N, K) or (G, N, K).
    """

    scales: nn.Parameter | None
    exact: nn.Parameter | None

    def __init__(self, slices: Sequence[TensorSlice], *shape: int) -> None:
        super().__init__()
        self._slices = tuple(slices)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.register_parameter("scales", None)
        self.register_parameter("exact", None)
        self._device: Device | None = None

    def hold_quantized(self, weights: Tensor, scales: Tensor, exact: Tensor | None, device: Device) -> None:
        """Hold a quantized matrix from here on.

        Args:
            weights: quantized weights of the first rows, groups one below another.
            scales: a scale for each of these rows.
            exact: all other rows; None where there are none.
            device: the device, whose kernels are used.
        """
        groups = self.weight.shape[:-2]
        shape = (*groups, len(weights) // groups.numel(), self.weight.shape[-1])
        self.weight = nn.Parameter(weights.view(shape), requires_grad=False)
        self.scales = nn.Parameter(scales.view(self.weight.shape[:-1]), requires_grad=False)
        self.exact = None if exact is None else nn.Parameter(exact, requires_grad=False)
        self._device = device

    def linear(self, inputs: Tensor, bias: Tensor | None = None, first_row: int = 0) -> Tensor:
        """Map (..., K) to (..., N - first_row), the outputs from `first_row` on, which is no exact one.

        Args:
            inputs: inputs of the layers.
            bias: (N - first_row,); None for none.
            first_row: the first row that is used.
        """
        if self.scales is None or self._device is None:
            return functional.linear(inputs, self.weight[first_row:], bias)
        weights, scales = self.weight[first_row:], self.scales[first_row:]
        if self.exact is None:
            return self._device.quantized_linear(inputs, weights, scales, bias)
        of_quantized, of_exact = (None, None) if bias is None else bias.tensor_split([len(weights)])
        return torch.cat(
            (
                self._device.quantized_linear(inputs, weights, scales, of_quantized),
                functional.linear(inputs, self.exact, of_exact),
            ),
            dim=-1,
        )

    def linear_of_each_group(self, inputs: Tensor) -> Tensor:
        """Map (G, R, K) to (G, R, N)."""
        if self.scales is None or self._device is None:
            return inputs @ self.weight.transpose(-2, -1)
        return torch.stack(
            [
                self._device.quantized_linear(of_group, weights, scales, None)
                for of_group, weights, scales in zip(inputs, self.weight, self.scales, strict=True)
            ]
        )

    def grouped_linear(self, rows: Tensor, ends: Tensor, exact: GroupedLinear) -> Tensor:
        """Map (R, K), groups of consecutive rows, to (R, N).

        Args:
            rows: rows of all groups.
            ends: (G,), int32, where each group ends.
            exact: the device's kernel for exact weights.
        """
        if self.scales is None or self._device is None:
            return exact(rows, self.weight, ends)
        return self._device.quantized_grouped_linear(rows, self.weight, self.scales, ends)

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """See `Sharded`."""
        return {"weight": self._slices}
