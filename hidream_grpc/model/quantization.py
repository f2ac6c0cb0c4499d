"""Quantizes matrices: symmetric, with one scale for each output channel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hidream_grpc.devices.device import Device
from hidream_grpc.model.weight_format import WeightFormat

MAX_BAND_WEIGHTS = 2**22
"""Most weights of a matrix that are quantized at a time: 16 MiB in float32."""

_DTYPES = {WeightFormat.INT8: torch.int8, WeightFormat.FLOAT8: torch.float8_e4m3fn}
_LARGEST = {WeightFormat.INT8: 127.0, WeightFormat.FLOAT8: 448.0}


def quantize(rows: Tensor, weights: WeightFormat) -> tuple[Tensor, Tensor]:
    """Quantize whole rows of a matrix, which are output channels.

    Scales are rounded to bfloat16 before they are used, so that the quantized matrix stands for the same
    numbers whatever dtype the model computes with.

    Args:
        rows: (N, K), in any floating dtype.
        weights: a quantized format.

    Returns:
        (N, K), one byte each, and the scales, (N,), float32.
    """
    exact, largest = rows.float(), _LARGEST[weights]
    scales = (exact.abs().amax(dim=1) / largest).bfloat16().float()
    # A row of zeros, or of numbers next to it, is zeros with any scale.
    scales[scales == 0.0] = 1.0
    units = exact.div_(scales[:, None]) if exact is not rows else exact / scales[:, None]
    if weights is WeightFormat.INT8:
        units = units.round_()
    return units.clamp_(-largest, largest).to(_DTYPES[weights]), scales


def empty_quantized(
    num_outputs: int, num_inputs: int, weights: WeightFormat, device: Device
) -> tuple[Tensor, Tensor]:
    """Memory on a device for a quantized matrix, (N, K), and its scales, (N,), in its dtype."""
    return (
        torch.empty(num_outputs, num_inputs, dtype=_DTYPES[weights], device=device.torch_device),
        torch.empty(num_outputs, dtype=device.dtype, device=device.torch_device),
    )


def bands(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Divide the rows of a matrix into bands that are quantized one after another."""
    height = max(1, MAX_BAND_WEIGHTS // num_columns)
    return (slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height))


class QuantizedLinear(nn.Module):
    """A linear layer of a library's module, quantized on its way to a device.

    Args:
        linear: the layer, on the CPU.
        weights: a quantized format.
        device: the device that computes with the layer.
    """

    def __init__(self, linear: nn.Linear, weights: WeightFormat, device: Device) -> None:
        super().__init__()
        # The libraries look at the dtype of a weight that exists.
        self.register_parameter("weight", None)
        matrix = linear.weight.data
        quantized, scales = empty_quantized(linear.out_features, linear.in_features, weights, device)
        for band in bands(*matrix.shape):
            quantized[band], scales[band] = quantize(matrix[band].to(device.torch_device), weights)
        self.quantized = nn.Parameter(quantized, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        bias = None if linear.bias is None else linear.bias.data.to(device.torch_device, device.dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._linear = device.quantized_linear

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., K) to (..., N)."""
        return self._linear(inputs, self.quantized, self.scales, self.bias)
