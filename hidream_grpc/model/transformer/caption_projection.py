"""Projects the outputs of the text encoders to the width of the transformer, once per prompt.

Legend: L tokens, D width of the transformer, blocks of both kinds, layers of Llama that blocks read.
"""

from __future__ import annotations

from torch import Tensor, nn

from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parallel.matrix import Matrix
from hidream_grpc.model.parallel.shards import TensorSlice


class CaptionProjection(nn.Module):
    """One projection of Llama's states for each block, and one of T5's; ranks divide the outputs.

    Args:
        config: configuration of the transformer.
        axis: the ranks that divide the outputs.
    """

    def __init__(self, config: TransformerConfig, axis: Axis) -> None:
        super().__init__()
        self._axis = axis
        self._width = config.width
        self._outputs = axis.share(config.width)
        layers = sorted(set(config.llama_layers))
        self._layer_of_block = tuple(layers.index(layer) for layer in config.llama_layers)
        t5_channels, llama_channels = config.caption_channels
        # The checkpoint counts T5's projection as one more block's.
        *of_blocks, of_t5 = (
            TensorSlice(f"caption_projection.{index}.linear.weight", rows=self._outputs)
            for index in range(config.num_blocks + 1)
        )
        self.llama = Matrix(of_blocks, config.num_blocks, len(self._outputs), llama_channels)
        self.t5 = Matrix([of_t5], len(self._outputs), t5_channels)

    def forward(self, t5: Tensor, llama: Tensor) -> tuple[Tensor, Tensor]:
        """Map (T, channels) and (layers, L, channels) to (T, D) and (blocks, L, D)."""
        of_blocks = self.llama.linear_of_each_group(llama[list(self._layer_of_block)])
        of_t5 = self.t5.linear(t5)
        return (
            self._axis.all_gather_shares(of_t5, self._width, dim=-1),
            self._axis.all_gather_shares(of_blocks, self._width, dim=-1),
        )
