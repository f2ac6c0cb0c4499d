"""Kernels of the transformer in plain torch, for devices that have no fused one, and parts of those.

Legend: B samples, T tokens, S keys, H heads, C channels of a head, R rows, G groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from hidream_grpc.devices.device_types import MAX_DEQUANTIZED_WEIGHTS


def attention(query: Tensor, key: Tensor, value: Tensor, first_key_count: int) -> Tensor:
    """See `Device.attention`; the count becomes a bias of the first key's logits."""
    bias = None
    if first_key_count > 1:
        bias = query.new_zeros(1, 1, 1, key.shape[1])
        bias[..., 0] = math.log(first_key_count)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2)


def add_zero_key(attended: Tensor, logsumexp: Tensor, value: Tensor, count: int) -> Tensor:
    """Add a key of zeros that counts `count` times to attention that was done without it.

    Args:
        attended: (B, T, H, C), over the other keys.
        logsumexp: (B, T, H), float32, of their logits.
        value: (B, 1, H, C), of the key of zeros, whose logit is 0 for every query.
        count: at least 1.

    Returns:
        (B, T, H, C), dtype of `attended`.
    """
    weight = torch.sigmoid(logsumexp - math.log(count))[..., None]
    merged = value + weight * (attended.float() - value)
    return merged.to(attended.dtype)


def rotate_pairs(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """See `Device.rotate`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    num_rotated = 2 * cosines.shape[-1]
    first, second = x[..., :num_rotated].to(exact).reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cosines, sines = cosines[:, None], sines[:, None]
    rotated = torch.stack((first * cosines - second * sines, first * sines + second * cosines), dim=-1)
    return torch.cat((rotated.flatten(-2).to(x.dtype), x[..., num_rotated:]), dim=-1)


def grouped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """See `Device.grouped_linear`; one product after another, with the ends on the host."""
    outputs = rows.new_empty(rows.shape[0], weights.shape[1])
    start = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        torch.mm(rows[start:end], weight.T, out=outputs[start:end])
        start = end
    return outputs


def dequantize(weights: Tensor, scales: Tensor) -> Tensor:
    """Turn quantized weights into numbers to compute with.

    Args:
        weights: (..., N, K), int8 or float8.
        scales: (..., N), one for each output channel.

    Returns:
        (..., N, K), dtype of the scales.
    """
    if weights.dtype.is_floating_point:
        # torch promotes float8 to nothing.
        return weights.to(scales.dtype).mul_(scales[..., None])
    return weights * scales[..., None]


def quantized_linear(inputs: Tensor, weights: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See `Device.quantized_linear`; the matrix is dequantized in parts that are not too large."""
    max_outputs = max(1, MAX_DEQUANTIZED_WEIGHTS // max(1, weights.shape[1]))
    if len(weights) <= max_outputs:
        return functional.linear(inputs, dequantize(weights, scales), bias)
    parts = [slice(start, start + max_outputs) for start in range(0, len(weights), max_outputs)]
    return torch.cat(
        [
            functional.linear(
                inputs, dequantize(weights[part], scales[part]), None if bias is None else bias[part]
            )
            for part in parts
        ],
        dim=-1,
    )


def quantized_grouped_linear(rows: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """See `Device.quantized_grouped_linear`; one matrix after another, with the ends on the host."""
    outputs = rows.new_empty(rows.shape[0], weights.shape[1])
    start = 0
    for weight, scale, end in zip(weights, scales, ends.tolist(), strict=True):
        if start < end:
            torch.mm(rows[start:end], dequantize(weight, scale).T, out=outputs[start:end])
        start = end
    return outputs
