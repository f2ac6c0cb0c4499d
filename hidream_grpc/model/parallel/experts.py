"""Routed experts: each rank of the expert axis holds some, each rank of the tensor axis a share of those.

Legend: B samples of this rank, T tokens of a sample, D width, E experts, K of them active for a token,
R rows of tokens that are routed together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parallel.layout import HIDDEN_UNITS_MULTIPLE
from hidream_grpc.model.parallel.matrix import GroupedLinear, Matrix
from hidream_grpc.model.parallel.shards import TensorSlice


class RoutedExperts(nn.Module):
    """SwiGLU experts behind a softmax gate of which each token takes the K best.

    Args:
        name: name in the checkpoint of the module with the gate and the experts.
        tensor_axis: the ranks that divide the hidden units of every expert.
        expert_axis: the ranks that divide the experts, and have different samples.
        width: D.
        num_hidden: hidden units of one expert.
        num_experts: E.
        num_active: K.
        grouped_linear: the device's kernel that multiplies groups of rows by a matrix each.
    """

    def __init__(
        self,
        name: str,
        tensor_axis: Axis,
        expert_axis: Axis,
        *,
        width: int,
        num_hidden: int,
        num_experts: int,
        num_active: int,
        grouped_linear: GroupedLinear,
    ) -> None:
        super().__init__()
        self._name = name
        self._expert_axis = expert_axis
        self._num_experts = num_experts
        self._num_active = num_active
        self._experts = expert_axis.share(num_experts)
        self._hidden = tensor_axis.share(num_hidden, HIDDEN_UNITS_MULTIPLE)
        self._grouped_linear = grouped_linear
        self.gate = nn.Parameter(torch.empty(num_experts, width), requires_grad=False)
        own = [f"{name}.experts.{expert}" for expert in self._experts]
        up_slices = [
            TensorSlice(f"{expert}.{layer}.weight", rows=self._hidden)
            for expert in own
            for layer in ("w1", "w3")
        ]
        down_slices = [TensorSlice(f"{expert}.w2.weight", columns=self._hidden) for expert in own]
        self.gate_and_up = Matrix(up_slices, len(own), 2 * len(self._hidden), width)
        self.down = Matrix(down_slices, len(own), width, len(self._hidden))

    def forward(self, tokens: Tensor, unpadded_samples: Tensor | None) -> Tensor:
        """Sum the weighted outputs of the active experts for each token.

        Args:
            tokens: (B, T, D), of this rank's samples; B and T are the same on every rank of the expert axis.
            unpadded_samples: int64 on the device, indices of the samples that are not padding, of those of
                all ranks of the expert axis one after another; None for all.

        Returns:
            (B, T, D), this rank's part of the sum over the tensor axis.

        Source: DeepSeek-V3's gate as in diffusers 0.42.1 transformer_hidream_image.py, MoEGate and
            moe_infer, without its copy of the counts to the host.
        """
        if not tokens.numel():
            # Of few tokens a rank of a long sequence axis has none, and kernels refuse such groups.
            return tokens
        if self._expert_axis.size == 1:
            return self._route(tokens.flatten(0, 1)).view_as(tokens)
        everywhere = self._expert_axis.all_gather(tokens).flatten(0, 1)
        unpadded = everywhere if unpadded_samples is None else everywhere.index_select(0, unpadded_samples)
        routed = self._route(unpadded.flatten(0, 1)).view_as(unpadded)
        if unpadded_samples is not None:
            routed = torch.zeros_like(everywhere).index_copy_(0, unpadded_samples, routed)
        return self._expert_axis.reduce_scatter(routed.view(self._expert_axis.size, *tokens.shape))

    def _route(self, rows: Tensor) -> Tensor:
        """Map (R, D) to (R, D), the outputs of this rank's experts; counts of tokens stay on the device."""
        weights, experts = (
            functional.linear(rows, self.gate).softmax(dim=-1).topk(self._num_active, dim=-1, sorted=False)
        )
        # Number this rank's experts first, so that their tokens are the first rows.
        own_first = (experts.flatten() - self._experts.start) % self._num_experts
        order = own_first.argsort(stable=True)
        ends = torch.zeros(self._num_experts, dtype=torch.int64, device=rows.device)
        ends = ends.scatter_add(0, own_first, torch.ones_like(own_first)).cumsum(0)
        ends = ends[: len(self._experts)].to(torch.int32)
        gate, up = self.gate_and_up.grouped_linear(
            rows[order // self._num_active], ends, self._grouped_linear
        ).chunk(2, dim=-1)
        hidden = functional.silu(gate, inplace=True).mul_(up)
        output = self.down.grouped_linear(hidden, ends, self._grouped_linear)
        output.mul_(weights.flatten()[order][:, None])
        if len(self._experts) < self._num_experts:
            # Rows of other ranks' experts are uninitialized memory.
            is_own = torch.arange(len(order), device=ends.device) < ends[-1]
            output = torch.where(is_own[:, None], output, 0.0)
        # Restore the order of the tokens, so that each sum has a fixed order, unlike with atomic adds.
        unsorted = torch.empty_like(output).index_copy_(0, order, output)
        return unsorted.view(-1, self._num_active, rows.shape[-1]).sum(1)

    def slices(self) -> dict[str, tuple[TensorSlice, ...]]:
        """See `Sharded`."""
        return {"gate": (TensorSlice(f"{self._name}.gate.weight"),)}
