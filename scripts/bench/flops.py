"""Floating-point operations of one forward of diffusers' transformer, for one sample, by formula.

Those of ours are counted where layouts are planned, in `hidream_grpc/model/costs/steps.py`, by one rule.
`tests/numerics/test_flops.py` holds both against torch's counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.weights.transformer import FREQUENCY_CHANNELS, swiglu_units
from hidream_grpc.model.costs.steps import Sample, step_costs
from hidream_grpc.model.parallel.layout import Layout

HIDREAM_I1_CONFIG: Mapping[str, Any] = {
    name: value
    for name, value in msgspec.to_builtins(HIDREAM_I1.transformer).items()
    if name != "_name_or_path"
}
"""The transformer of HiDream-I1, as the library's class takes it."""

# The autoencoder's: pixels of a latent's side.
VAE_SCALE_FACTOR = 8

_NUMBER_BYTES = 2


def library_forward_flops(config: TransformerConfig, sample: Sample) -> int:
    """Count the operations of one forward of diffusers' `HiDreamImageTransformer2DModel`."""
    width, token_channels = config.width, config.patch_size**2
    image = sample.height * sample.width // token_channels if sample.is_square else config.max_tokens
    text = sample.num_t5_tokens + 2 * sample.num_llama_tokens
    tokens = image + text
    attention = 4 * width**2 * tokens + 2 * tokens**2 * width
    ends = image * token_channels * (config.in_channels + (config.out_channels or config.in_channels)) * width
    double_block = (
        12 * width**2
        + attention
        + image * _routed_feed_forward(config)
        + text * _feed_forward(width, 4 * width)
    )
    single_block = 6 * width**2 + attention + tokens * _routed_feed_forward(config)
    multiply_adds = (
        ends + config.num_layers * double_block + config.num_single_layers * single_block + 2 * width**2
    )
    return 2 * multiply_adds + timestep_flops(config) + prompt_flops(config, sample)


def exact_forward_flops(config: TransformerConfig, sample: Sample) -> int:
    """Count the operations of one forward of ours, without what depends on prompt or schedule alone."""
    return step_costs(config, Layout(), 0, sample, 1, _NUMBER_BYTES).flops


def timestep_flops(config: TransformerConfig) -> int:
    """Count what the library does in each forward and ours once a schedule: embedding a timestep."""
    return 2 * (FREQUENCY_CHANNELS + config.width) * config.width


def prompt_flops(config: TransformerConfig, sample: Sample) -> int:
    """Count what the library does in each forward and ours once a prompt: captions, pooled embedding."""
    t5_channels, llama_channels = config.caption_channels
    llama = config.num_blocks * sample.num_llama_tokens * llama_channels
    captions = (llama + sample.num_t5_tokens * t5_channels) * config.width
    pooled = (config.text_emb_dim + config.width) * config.width
    return 2 * (captions + pooled)


def _routed_feed_forward(config: TransformerConfig) -> int:
    """Count multiply-adds of one token with its gate, its experts and the shared expert."""
    width = config.width
    if not config.num_routed_experts:
        return _feed_forward(width, 4 * width)
    return (
        width * config.num_routed_experts
        + config.num_activated_experts * _feed_forward(width, 4 * width)
        + _feed_forward(width, 2 * width)
    )


def _feed_forward(width: int, hidden_dim: int) -> int:
    """Count multiply-adds of one token in a SwiGLU."""
    return 3 * width * swiglu_units(hidden_dim)
