"""How many bytes of weights each rank of a layout holds, to the byte, from the configurations alone.

`tests/numerics/test_layout_costs.py` holds them against real ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hidream_grpc.model.checkpoint.configs import CheckpointConfigs
from hidream_grpc.model.checkpoint.files import TransformerConfig, VaeConfig
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.checkpoint.weights.text_encoders import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.checkpoint.weights.transformer import (
    FREQUENCY_CHANNELS,
    Shapes,
    modulations,
    swiglu_units,
)
from hidream_grpc.model.checkpoint.weights.vae import vae_tensors
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.parallel.layout import HIDDEN_UNITS_MULTIPLE


@dataclass(frozen=True, slots=True)
class HeldMatrix:
    """Some matrices of one shape that a rank holds.

    Attributes:
        count: number of such matrices.
        num_outputs, num_inputs: of one matrix; a vector has one input.
    """

    count: int
    num_outputs: int
    num_inputs: int = 1

    @property
    def num_weights(self) -> int:
        """Weights of all of them."""
        return self.count * self.num_outputs * self.num_inputs


def transformer_num_weights(config: TransformerConfig, place: RankPlace) -> int:
    """Number of the transformer's weights that a rank holds."""
    return sum(held.num_weights for held in held_matrices(config, place))


def held_matrices(config: TransformerConfig, place: RankPlace) -> Iterator[HeldMatrix]:
    """What a rank holds of the transformer: see `HiDreamTransformer`."""
    width, token_channels = config.width, config.patch_size**2
    t5_channels, llama_channels = config.caption_channels
    for num_outputs, num_inputs in (
        (width, token_channels * config.in_channels),
        (width, FREQUENCY_CHANNELS),
        (width, width),
        (width, config.text_emb_dim),
        (width, width),
        (token_channels * (config.out_channels or config.in_channels), width),
        (place.model_share(sum(outputs for _, outputs in modulations(config))), width),
    ):
        yield HeldMatrix(1, num_outputs, num_inputs)
        yield HeldMatrix(1, num_outputs)
    caption_outputs = place.model_share(width)
    yield HeldMatrix(config.num_blocks, caption_outputs, llama_channels)
    yield HeldMatrix(1, caption_outputs, t5_channels)

    num_streams = 2 * config.num_layers + config.num_single_layers
    channels = place.tensor_share(config.num_attention_heads) * config.attention_head_dim
    yield HeldMatrix(3 * num_streams, channels, width)
    yield HeldMatrix(3 * num_streams, channels)
    # Norms of queries and of keys.
    yield HeldMatrix(2 * num_streams, channels)
    yield HeldMatrix(num_streams, width, channels)
    if place.tensor_index == 0:
        yield HeldMatrix(num_streams, width)

    yield HeldMatrix(config.num_blocks, config.num_routed_experts, width)
    num_experts = config.num_blocks * place.expert_share(config.num_routed_experts)
    yield from _swiglus(num_experts, 4 * width, config, place)
    yield from _swiglus(config.num_blocks, 2 * width, config, place)
    yield from _swiglus(config.num_layers, 4 * width, config, place)


def _swiglus(
    count: int, hidden_dim: int, config: TransformerConfig, place: RankPlace
) -> Iterator[HeldMatrix]:
    num_units = place.tensor_share(swiglu_units(hidden_dim), HIDDEN_UNITS_MULTIPLE)
    yield HeldMatrix(2 * count, num_units, config.width)
    yield HeldMatrix(count, config.width, num_units)


def vae_num_weights(config: VaeConfig) -> int:
    """Number of weights of the autoencoder, which every rank holds whole."""
    return _num_elements(vae_tensors(config))


def text_encoder_num_weights(configs: CheckpointConfigs) -> Mapping[TextEncoderName, int]:
    """Number of weights of each text encoder, which one rank holds whole."""
    return {
        TextEncoderName.CLIP_L: _num_elements(clip_tensors(configs.clip_l)),
        TextEncoderName.CLIP_G: _num_elements(clip_tensors(configs.clip_g)),
        TextEncoderName.T5: _num_elements(t5_tensors(configs.t5)),
        TextEncoderName.LLAMA: _num_elements(llama_tensors(configs.llama)),
    }


def _num_elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))
