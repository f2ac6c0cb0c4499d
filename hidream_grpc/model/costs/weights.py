"""How many bytes of weights each rank of a layout holds, to the byte, from the configurations alone.

`tests/numerics/test_layout_costs.py` holds them against real ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hidream_grpc.model.checkpoint.configs import CheckpointConfigs
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.checkpoint.weights.text_encoders import clip_tensors, llama_tensors, t5_tensors
from hidream_grpc.model.checkpoint.weights.transformer import (
    FREQUENCY_CHANNELS,
    Shapes,
    modulations,
    swiglu_units,
)
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.parallel.layout import HIDDEN_UNITS_MULTIPLE
from hidream_grpc.model.weight_format import WeightFormat


@dataclass(frozen=True, slots=True)
class HeldMatrix:
    """Some matrices of one shape that a rank holds.

    Attributes:
        count: number of such matrices.
        num_outputs, num_inputs: output and input channels of one matrix; a vector has one input.
        is_layer: whether a format with fewer bits applies to it, see `is_quantized_tensor`.
    """

    count: int
    num_outputs: int
    num_inputs: int = 1
    is_layer: bool = False

    def size_bytes(self, weights: WeightFormat, bytes_per_weight: int) -> int:
        """Bytes of all of them.

        Args:
            weights: the format of the component.
            bytes_per_weight: size of the dtype in which the model computes.
        """
        of_matrix = weights if self.is_layer else WeightFormat.BFLOAT16
        return self.count * of_matrix.matrix_bytes(self.num_outputs, self.num_inputs, bytes_per_weight)


def transformer_bytes(
    config: TransformerConfig, place: RankPlace, weights: WeightFormat, bytes_per_weight: int
) -> int:
    """Bytes of what a rank holds of the transformer.

    Args:
        config: the configuration of the transformer.
        place: the place of the rank in its layout.
        weights: the format of the matrices of its layers.
        bytes_per_weight: size of the dtype in which the model computes.
    """
    return sum(held.size_bytes(weights, bytes_per_weight) for held in held_matrices(config, place))


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
    ):
        yield HeldMatrix(1, num_outputs, num_inputs)
        yield HeldMatrix(1, num_outputs)
    yield from _modulations(config, place)
    num_captions = len(place.model_share(width))
    yield HeldMatrix(config.num_blocks, num_captions, llama_channels, is_layer=True)
    yield HeldMatrix(1, num_captions, t5_channels, is_layer=True)

    num_streams = 2 * config.num_layers + config.num_single_layers
    channels = len(place.tensor_share(config.num_attention_heads)) * config.attention_head_dim
    yield HeldMatrix(3 * num_streams, channels, width, is_layer=True)
    yield HeldMatrix(3 * num_streams, channels)
    # Norms of queries and of keys.
    yield HeldMatrix(2 * num_streams, channels)
    yield HeldMatrix(num_streams, width, channels, is_layer=True)
    if place.tensor_index == 0:
        yield HeldMatrix(num_streams, width)

    yield HeldMatrix(config.num_blocks, config.num_routed_experts, width)
    num_experts = config.num_blocks * len(place.expert_share(config.num_routed_experts))
    yield from _swiglus(num_experts, 4 * width, config, place)
    yield from _swiglus(config.num_blocks, 2 * width, config, place)
    yield from _swiglus(config.num_layers, 4 * width, config, place)


def _modulations(config: TransformerConfig, place: RankPlace) -> Iterator[HeldMatrix]:
    """The share of one product that gives the modulations of all blocks and, last, of the final layer."""
    num_outputs = [count for _, count in modulations(config)]
    own = place.model_share(sum(num_outputs))
    num_of_blocks = sum(num_outputs[:-1])
    of_blocks = max(0, min(own.stop, num_of_blocks) - own.start)
    yield HeldMatrix(1, of_blocks, config.width, is_layer=True)
    yield HeldMatrix(1, len(own) - of_blocks, config.width)
    yield HeldMatrix(1, len(own))


def _swiglus(
    count: int, hidden_dim: int, config: TransformerConfig, place: RankPlace
) -> Iterator[HeldMatrix]:
    num_units = len(place.tensor_share(swiglu_units(hidden_dim), HIDDEN_UNITS_MULTIPLE))
    yield HeldMatrix(2 * count, num_units, config.width, is_layer=True)
    yield HeldMatrix(count, config.width, num_units, is_layer=True)


def grouped_weights(config: TransformerConfig, place: RankPlace) -> int:
    """Weights of the routed experts of one block that a rank holds."""
    num_experts = len(place.expert_share(config.num_routed_experts))
    swiglus = _swiglus(num_experts, 4 * config.width, config, place)
    return sum(held.count * held.num_outputs * held.num_inputs for held in swiglus)


def text_encoder_tensors(configs: CheckpointConfigs) -> Mapping[TextEncoderName, Shapes]:
    """The tensors of each text encoder, which one rank holds whole."""
    return {
        TextEncoderName.CLIP_L: clip_tensors(configs.clip_l),
        TextEncoderName.CLIP_G: clip_tensors(configs.clip_g),
        TextEncoderName.T5: t5_tensors(configs.t5),
        TextEncoderName.LLAMA: llama_tensors(configs.llama),
    }
