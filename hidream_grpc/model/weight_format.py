"""The formats in which a rank holds weights: which tensors they apply to, and how many bytes those take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

_QUANTIZED = re.compile(
    # Of the transformer: attention, feed-forwards and experts, modulations of blocks, caption projections.
    r".*\.attn1\.to_(q|k|v|out)(_t)?\.weight"
    r"|.*\.(experts\.\d+|shared_experts|ff_t)\.w[123]\.weight"
    r"|(double|single)_stream_blocks\..*\.adaLN_modulation\.1\.weight"
    r"|caption_projection\.\d+\.linear\.weight"
    # Of CLIP and Llama, then of T5: attention and feed-forwards.
    r"|(.*\.)?layers\.\d+\.(self_attn\.\w+_proj|mlp\.(\w+_proj|fc[12]))\.weight"
    r"|encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight"
)


class WeightFormat(StrEnum):
    """How the matrices of a model's layers are held; the value is what `--weights` takes.

    BFLOAT16 is the dtype in which the model computes, so float32 on a CPU. In INT8 and FLOAT8 (E4M3) each
    weight is one byte, and each output channel of a matrix has a scale in the dtype of the computation.
    """

    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    FLOAT8 = "float8"

    @property
    def is_quantized(self) -> bool:
        """Whether a weight takes fewer bits than the model computes with."""
        return self is not WeightFormat.BFLOAT16

    def bytes_per_weight(self, exact: int) -> int:
        """Bytes of a weight to which this format applies, without its share of a scale.

        Args:
            exact: size of the dtype in which the model computes.
        """
        return 1 if self.is_quantized else exact

    def matrix_bytes(self, num_outputs: int, num_inputs: int, bytes_per_weight: int) -> int:
        """Bytes of a matrix, or of a rank's share of one, to which this format applies.

        Args:
            num_outputs: output channels, each of which has a scale.
            num_inputs: input channels.
            bytes_per_weight: size of the dtype in which the model computes.
        """
        if not self.is_quantized:
            return num_outputs * num_inputs * bytes_per_weight
        return num_outputs * (num_inputs + bytes_per_weight)

    def component_bytes(self, shapes: Mapping[str, tuple[int, ...]], bytes_per_weight: int) -> int:
        """Bytes of a component that a rank holds whole, such as a text encoder.

        Args:
            shapes: the shapes of its tensors, by name.
            bytes_per_weight: size of the dtype in which the model computes.
        """
        return sum(
            self.matrix_bytes(shape[0], shape[1], bytes_per_weight)
            if is_quantized_tensor(name)
            else math.prod(shape) * bytes_per_weight
            for name, shape in shapes.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormats:
    """The formats of the parts of one model; the autoencoder always has that of the computation.

    Attributes:
        transformer: format of the transformer.
        text_encoders: format of the text encoders that are on the device of their rank. On the host of an
            accelerator they have the dtype that a CPU computes with.
    """

    transformer: WeightFormat = WeightFormat.BFLOAT16
    text_encoders: WeightFormat = WeightFormat.BFLOAT16


def is_quantized_tensor(name: str) -> bool:
    """Whether formats with fewer bits apply to a tensor of a transformer or text encoder, by its name.

    They apply to matrices of the layers; norms, biases, embeddings, gates of experts and final layers stay.
    """
    return _QUANTIZED.fullmatch(name) is not None
