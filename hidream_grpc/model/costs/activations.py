"""How much memory a rank needs beside its weights: for a step, for decoding an image, for encoded prompts.

Counted from the tensors that are alive at the same time, not from what kernels take as workspace or an
allocator loses between tensors. `tests/numerics/test_layout_costs.py` holds the formulas against the tensors
of real forwards.
"""

from __future__ import annotations

from collections.abc import Iterator

from hidream_grpc.model.checkpoint.files import TransformerConfig, VaeConfig
from hidream_grpc.model.checkpoint.weights.transformer import modulations, swiglu_units
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.costs.steps import Sample, own_tokens
from hidream_grpc.model.decoding.bands import num_bands
from hidream_grpc.model.parallel.layout import HIDDEN_UNITS_MULTIPLE

MAX_CACHED_PROMPTS = 16
"""Prompts that stay encoded on every rank, beside the empty one; one of the released model takes 32 MB."""

_FLOAT32_BYTES = 4


def step_bytes(
    config: TransformerConfig, place: RankPlace, sample: Sample, num_rows: int, bytes_per_number: int
) -> int:
    """Bytes of a rank's tensors at the fullest moment of a step: in a block's attention, or at its experts.

    Args:
        config: the configuration of the transformer.
        place: the place of the rank in its layout.
        sample: size of each row.
        num_rows: rows of the step on all ranks together.
        bytes_per_number: size of the dtype in which the model computes.
    """
    own_rows, _ = place.rows(num_rows)
    expert_size, width = place.layout.expert_parallel, config.width
    image, text, llama = own_tokens(config, place, sample)
    busy = image + text
    channels = len(place.tensor_share(config.num_attention_heads)) * config.attention_head_dim
    num_units = len(place.tensor_share(swiglu_units(4 * width), HIDDEN_UNITS_MULTIPLE))

    # For all blocks: Llama's tokens, the text, and the modulations of all rows of the model.
    kept = own_rows * (config.num_blocks * sample.num_llama_tokens + 2 * sample.num_text_tokens) * width
    kept += 2 * own_rows * expert_size * sum(outputs for _, outputs in modulations(config))
    # Queries, keys and values: as they come, normed, and by head.
    attention = own_rows * (3 * busy * width + channels * (8 * busy + 5 * llama))
    keys_in_float32 = 3 * own_rows * (busy + llama) * channels * _FLOAT32_BYTES
    exchanged = 0
    if place.layout.sequence_parallel > 1:
        # As they are sent, as they come, and in the order of their tokens.
        exchanged = 3 * own_rows * channels * (3 * busy + 2 * llama)
    # Tokens of all ranks of the expert axis, and for each active expert of a token what it computes.
    routed = own_rows * expert_size * busy
    experts = 5 * own_rows * busy * width
    experts += routed * (width + config.num_activated_experts * 2 * (num_units + width))
    if expert_size > 1:
        experts += routed * width
    return kept * bytes_per_number + max(
        attention * bytes_per_number + keys_in_float32,
        (attention + exchanged) * bytes_per_number,
        experts * bytes_per_number,
    )


def prompts_bytes(config: TransformerConfig, sample: Sample, bytes_per_number: int) -> int:
    """Bytes of the prompts that stay encoded, which are the same on every rank."""
    tokens = config.num_blocks * sample.num_llama_tokens + sample.num_t5_tokens + 1
    return (MAX_CACHED_PROMPTS + 1) * tokens * config.width * bytes_per_number


def decode_bytes(config: VaeConfig, width: int, height: int, bytes_per_number: int) -> int:
    """Bytes of the decoder's tensors at the fullest moment of an image.

    Args:
        config: the configuration of the autoencoder.
        width, height: size of the image, in pixels.
        bytes_per_number: size of the dtype in which the model computes.
    """
    return max(_decoder_numbers(config, width, height)) * bytes_per_number


def _decoder_numbers(config: VaeConfig, width: int, height: int) -> Iterator[int]:
    """Yield how many numbers are alive in each convolution of the decoder, see `decode_in_slices`."""
    channels = config.block_out_channels[::-1]
    before = channels[0]
    for index, after in enumerate(channels):
        scale = 2 ** (len(channels) - 1 - index)
        pixels, band = _pixels_and_band(width // scale, height // scale)
        for _ in range(config.layers_per_block + 1):
            # The block's input, the normed one and the output; a band of both, and the band before it.
            yield (2 * before + after) * pixels + (before + 2 * after) * band
            yield (before + 2 * after) * pixels + 3 * after * band
            before = after
        if index < len(channels) - 1:
            enlarged, band = _pixels_and_band(2 * width // scale, 2 * height // scale)
            yield after * (pixels + enlarged + 3 * band)


def _pixels_and_band(width: int, height: int) -> tuple[int, int]:
    """Pixels of a layer's output, and of a band of it with the rows above and below."""
    pixels = width * height
    return pixels, pixels // num_bands(pixels) + 2 * width
