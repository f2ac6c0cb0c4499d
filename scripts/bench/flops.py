"""Floating-point operations of one forward of the transformer, for one sample, by formula.

A multiply-add counts as two; what is no matrix product (norms, activations, RoPE, softmax) counts as
nothing, as with torch's own counter. `tests/numerics/test_flops.py` holds the formulas against that
counter, on the library's forward and on ours.

Letters as in the shapes: N image tokens, S text tokens that live from block to block (T5's, and those of
Llama's last layer), L tokens of Llama that each block appends and drops again, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The transformer of HiDream-I1 Full, Dev and Fast.
HIDREAM_I1_CONFIG: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [64, 32, 32],
    "max_resolution": [128, 128],
    "llama_layers": [*range(32), *[31] * 16],
}
# The autoencoder's: pixels of a latent's side.
VAE_SCALE_FACTOR = 8

_FREQUENCY_CHANNELS = 256
_HIDDEN_MULTIPLE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerDimensions:
    """The part of a transformer's configuration that its operations depend on.

    Attributes:
        patch_size: latents of a token's side.
        in_channels, out_channels: of the latents.
        num_layers: blocks with a text stream beside the image stream.
        num_single_layers: blocks with one stream.
        width: of a token.
        t5_channels, llama_channels: of the prompt's embeddings.
        text_emb_dim: of CLIP's pooled embeddings.
        num_routed_experts: 0 where feed-forwards are plain.
        num_activated_experts: of them, for each token.
        max_image_tokens: to which the library pads latents that are not square.
    """

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    width: int
    t5_channels: int
    llama_channels: int
    text_emb_dim: int
    num_routed_experts: int
    num_activated_experts: int
    max_image_tokens: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerDimensions:
        """Read them from the configuration of a `HiDreamImageTransformer2DModel`."""
        max_resolution: Sequence[int] = config["max_resolution"]
        return cls(
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"] or config["in_channels"],
            num_layers=config["num_layers"],
            num_single_layers=config["num_single_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            t5_channels=config["caption_channels"][0],
            llama_channels=config["caption_channels"][1],
            text_emb_dim=config["text_emb_dim"],
            num_routed_experts=config["num_routed_experts"],
            num_activated_experts=config["num_activated_experts"],
            max_image_tokens=max_resolution[0] * max_resolution[1] // config["patch_size"] ** 2,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Size of one sample.

    Attributes:
        height, width: of the latents.
        num_t5_tokens, num_llama_tokens: of the prompt, padding included.
    """

    height: int
    width: int
    num_t5_tokens: int = 128
    num_llama_tokens: int = 128

    @property
    def is_square(self) -> bool:
        """Whether the library leaves it unpadded."""
        return self.height == self.width


HIDREAM_I1 = TransformerDimensions.from_config(HIDREAM_I1_CONFIG)


def library_forward_flops(dimensions: TransformerDimensions, sample: Sample) -> int:
    """Count the operations of one forward of diffusers' `HiDreamImageTransformer2DModel`."""
    num_image_tokens = _num_image_tokens(dimensions, sample)
    if not sample.is_square:
        num_image_tokens = dimensions.max_image_tokens
    forward = _forward_multiply_adds(dimensions, sample, num_image_tokens, num_idle_tokens=0)
    return 2 * forward + prompt_flops(dimensions, sample)


def exact_forward_flops(dimensions: TransformerDimensions, sample: Sample) -> int:
    """Count the operations of one forward of ours.

    It has one token for all padding, and keys and values only for what a block drops. What depends on the
    prompt alone is left out: see `prompt_flops`.
    """
    num_image_tokens = _num_image_tokens(dimensions, sample)
    if not sample.is_square and num_image_tokens < dimensions.max_image_tokens:
        num_image_tokens += 1
    return 2 * _forward_multiply_adds(
        dimensions, sample, num_image_tokens, num_idle_tokens=sample.num_llama_tokens
    )


def prompt_flops(dimensions: TransformerDimensions, sample: Sample) -> int:
    """Count what the library does in each forward and ours once a prompt: captions, pooled embedding."""
    num_blocks = dimensions.num_layers + dimensions.num_single_layers
    llama = num_blocks * sample.num_llama_tokens * dimensions.llama_channels
    captions = (llama + sample.num_t5_tokens * dimensions.t5_channels) * dimensions.width
    pooled = (dimensions.text_emb_dim + dimensions.width) * dimensions.width
    return 2 * (captions + pooled)


def _num_image_tokens(dimensions: TransformerDimensions, sample: Sample) -> int:
    return sample.height * sample.width // dimensions.patch_size**2


def _forward_multiply_adds(
    dimensions: TransformerDimensions, sample: Sample, num_image_tokens: int, num_idle_tokens: int
) -> int:
    """Count multiply-adds of one forward without what depends on the prompt alone.

    Args:
        num_idle_tokens: of those that a block appends, how many only offer keys and values.
    """
    width = dimensions.width
    num_text_tokens = sample.num_t5_tokens + 2 * sample.num_llama_tokens
    num_tokens = num_image_tokens + num_text_tokens
    num_busy_text_tokens = num_text_tokens - num_idle_tokens
    num_busy_tokens = num_tokens - num_idle_tokens

    projections = width**2 * (4 * num_busy_tokens + 2 * num_idle_tokens)
    scores_and_values = 2 * num_busy_tokens * num_tokens * width
    attention = projections + scores_and_values

    token_channels = dimensions.patch_size**2
    ends = num_image_tokens * token_channels * (dimensions.in_channels + dimensions.out_channels) * width
    timestep = (_FREQUENCY_CHANNELS + width) * width
    double_block = (
        12 * width**2
        + attention
        + num_image_tokens * _routed_feed_forward(dimensions)
        + num_busy_text_tokens * _feed_forward(width, 4 * width)
    )
    single_block = 6 * width**2 + attention + num_busy_tokens * _routed_feed_forward(dimensions)
    return (
        ends
        + timestep
        + dimensions.num_layers * double_block
        + dimensions.num_single_layers * single_block
        + 2 * width**2
    )


def _routed_feed_forward(dimensions: TransformerDimensions) -> int:
    """Count multiply-adds of one token with its gate, its experts and the shared expert."""
    width = dimensions.width
    if not dimensions.num_routed_experts:
        return _feed_forward(width, 4 * width)
    return (
        width * dimensions.num_routed_experts
        + dimensions.num_activated_experts * _feed_forward(width, 4 * width)
        + _feed_forward(width, 2 * width)
    )


def _feed_forward(width: int, nominal_hidden: int) -> int:
    """Count multiply-adds of one token in a SwiGLU of the library, which takes two thirds and rounds up."""
    hidden = -(-int(2 * nominal_hidden / 3) // _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE
    return 3 * width * hidden
