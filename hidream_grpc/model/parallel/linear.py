"""Linear layers of which a rank holds a share, and the feed-forward made of them. Independent of any model.

No layer here sums over the axis: a row-parallel layer returns a partial result, so that its caller can sum
several of them in one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parallel.layout import HIDDEN_UNITS_MULTIPLE
from hidream_grpc.model.parallel.matrix import Matrix
from hidream_grpc.model.parallel.shards import TensorSlice


class ColumnParallelLinear(nn.Module):
    """Several layers with one input as one matrix; this rank computes some outputs of each.

    Args:
        names: names of the layers in the checkpoint.
        in_features: inputs of each layer.
        outputs: outputs of each layer that this rank computes.
        bias: whether the layers have a bias.
    """

    def __init__(self, names: Sequence[str], in_features: int, outputs: range, *, bias: bool) -> None:
        super().__init__()
        self._names = tuple(names)
        self._outputs = outputs
        slices = [TensorSlice(f"{name}.weight", rows=outputs) for name in names]
        self.matrix = Matrix(slices, len(names) * len(outputs), in_features)
        self.bias = _parameter(len(names) * len(outputs)) if bias else None

    def forward(self, inputs: Tensor, first_layer: int = 0) -> tuple[Tensor, ...]:
        """Apply the layers from `first_layer` on: (..., in_features) to (..., len(outputs)) for each."""
        first_row = first_layer * len(self._outputs)
        bias = None if self.bias is None else self.bias[first_row:]
        outputs = self.matrix.linear(inputs, bias, first_row)
        return torch.split(outputs, len(self._outputs), dim=-1)

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """See `Sharded`."""
        if self.bias is None:
            return {}
        return {"bias": tuple(TensorSlice(f"{name}.bias", rows=self._outputs) for name in self._names)}


class RowParallelLinear(nn.Module):
    """A layer applied to this rank's inputs alone; summed over the axis the results are the layer's output.

    Args:
        name: name of the layer in the checkpoint.
        axis: the ranks that divide the inputs; the first one adds the bias.
        inputs: inputs that this rank has.
        out_features: all outputs of the layer.
        bias: whether the layer has a bias.
    """

    def __init__(self, name: str, axis: Axis, inputs: range, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self._name = name
        self.matrix = Matrix([TensorSlice(f"{name}.weight", columns=inputs)], out_features, len(inputs))
        self.bias = _parameter(out_features) if bias and axis.index == 0 else None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., len(inputs)) to (..., out_features), this rank's part of the sum."""
        return self.matrix.linear(inputs, self.bias)

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """See `Sharded`."""
        return {} if self.bias is None else {"bias": (TensorSlice(f"{self._name}.bias"),)}


class GatheredLinear(nn.Module):
    """Many layers with one input as one matrix; ranks compute shares of the outputs and gather the rest.

    Args:
        axis: the ranks that divide the outputs.
        names: names of the layers in the checkpoint.
        in_features: inputs of each layer.
        out_features: outputs of each layer.
    """

    def __init__(
        self, axis: Axis, names: Sequence[str], in_features: int, out_features: Sequence[int]
    ) -> None:
        super().__init__()
        self._axis = axis
        self._layers = tuple(zip(names, out_features, strict=True))
        self._total = sum(out_features)
        self._outputs = axis.share(self._total)
        self.matrix = Matrix(self._slices("weight"), len(self._outputs), in_features)
        self.bias = _parameter(len(self._outputs))

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Map (B, in_features), the same on every rank, to (B, out_features) for each layer."""
        outputs = self.matrix.linear(inputs, self.bias)
        gathered = self._axis.all_gather_shares(outputs, self._total, dim=-1)
        return torch.split(gathered, [out_features for _, out_features in self._layers], dim=-1)

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """See `Sharded`."""
        return {"bias": self._slices("bias")}

    def _slices(self, kind: str) -> tuple[TensorSlice, ...]:
        rows_of, first = [], 0
        for name, out_features in self._layers:
            start = max(self._outputs.start - first, 0)
            stop = min(self._outputs.stop - first, out_features)
            if start < stop:
                rows_of.append((name, range(start, stop)))
            first += out_features
        return tuple(TensorSlice(f"{name}.{kind}", rows=rows) for name, rows in rows_of)


class SwiGLU(nn.Module):
    """A gated feed-forward with SiLU; ranks divide its hidden units.

    Args:
        name: name in the checkpoint.
        axis: the ranks that divide the hidden units.
        width: number of inputs, and of outputs.
        num_hidden: hidden units of all ranks together.
    """

    def __init__(self, name: str, axis: Axis, width: int, num_hidden: int) -> None:
        super().__init__()
        hidden = axis.share(num_hidden, HIDDEN_UNITS_MULTIPLE)
        self.gate_and_up = ColumnParallelLinear((f"{name}.w1", f"{name}.w3"), width, hidden, bias=False)
        self.down = RowParallelLinear(f"{name}.w2", axis, hidden, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., width) to (..., width), this rank's part of the sum."""
        gate, up = self.gate_and_up(inputs)
        # In place, since new memory would cost more than the arithmetic.
        partial: Tensor = self.down(functional.silu(gate, inplace=True).mul_(up))
        return partial


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
