"""Counting what a call does on a rank: floating-point operations, and bytes sent in collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hidream_grpc.devices import kernels
from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.model.parallel.groups import Axis, ParallelGroups


def counted_flops(call: Callable[[], Any]) -> int:
    """Count the floating-point operations of one call with torch's counter: 2 for each multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=_MISSING_FROM_TORCH) as counter:
        call()
    return int(counter.get_total_flops())


def counted_peak_bytes(call: Callable[[], Any]) -> int:
    """Count the bytes of the tensors that one call makes and that are alive at the same time, at most."""
    with _LiveBytes() as live:
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Follows the memory of tensors from the operation that makes it to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, operation: Any, _types: Any, arguments: Any = (), options: Any = None
    ) -> object:
        result = operation(*arguments, **(options or {}))
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        known = set(map(_storage, _tensors((arguments, options))))
        for tensor in _tensors(result):
            if (storage := _storage(tensor)) not in known:
                self._live[storage] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
        return result


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


class CountingAxis(Axis):
    """An axis that counts what this rank sends; tensors on meta get the shape of a result, and no group.

    Attributes:
        bytes_sent: by ring algorithms, which send least: each rank's part of the data goes past every
            other rank once, and twice where it is summed and the sum given to all.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis.name, axis.ranks, axis.rank)
        self.bytes_sent = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Axis`."""
        self.bytes_sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        return tensor if tensor.is_meta else super().all_reduce(tensor)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """See `Axis`."""
        self.bytes_sent += (self.size - 1) * tensor.nbytes
        return tensor.new_empty((self.size, *tensor.shape)) if tensor.is_meta else super().all_gather(tensor)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """See `Axis`."""
        self.bytes_sent += (self.size - 1) * tensor.nbytes // self.size
        return tensor.new_empty(tensor.shape[1:]) if tensor.is_meta else super().reduce_scatter(tensor)

    def all_to_all(self, tensor: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See `Axis`."""
        row_bytes = prod(tensor.shape[1:]) * tensor.itemsize
        self.bytes_sent += (sum(sent) - sent[self.index]) * row_bytes
        if tensor.is_meta:
            return tensor.new_empty((sum(received), *tensor.shape[1:]))
        return super().all_to_all(tensor, sent, received)


def count_bytes_sent(groups: ParallelGroups) -> tuple[CountingAxis, ...]:
    """Put counting axes in the place of all axes of a rank, before its group is made."""
    groups.tensor, groups.sequence, groups.expert, groups.model, groups.samples = axes = tuple(
        map(CountingAxis, (groups.tensor, groups.sequence, groups.expert, groups.model, groups.samples))
    )
    return axes


class MetaDevice:
    """A device without memory, on which each routed expert gets equally many tokens.

    Args:
        dtype: of the model.
        num_experts: of each mixture, those of other ranks included.
    """

    name = "meta"
    backend = ""
    torch_device = torch.device("meta")

    def __init__(self, dtype: torch.dtype, num_experts: int) -> None:
        self.dtype = dtype
        self._num_experts = num_experts

    def memory(self) -> DeviceMemory:
        """Return None: there is no memory to measure."""
        return DeviceMemory(total_bytes=0, free_bytes=0)

    def synchronize(self) -> None:
        """Return at once: nothing runs on this device."""

    def empty_cache(self) -> None:
        """Do nothing: this device holds no memory."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return False: a device without memory never runs out of it."""
        return False

    attention = staticmethod(kernels.attention)
    rotate = staticmethod(kernels.rotate_pairs)

    def grouped_linear(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """See `Device`; where the groups end is known nowhere, so they are taken to be of one size."""
        num_rows = rows.shape[0] // self._num_experts
        for weight in weights:
            torch.mm(rows[:num_rows], weight.T)
        return rows.new_empty(rows.shape[0], weights.shape[1])

    quantized_linear = staticmethod(kernels.quantized_linear)

    def quantized_grouped_linear(self, rows: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        """See `Device`."""
        return self.grouped_linear(rows, kernels.dequantize(weights, scales), ends)


def _cpu_attention_flops(
    query_shape: torch.Size, key_shape: torch.Size, value_shape: torch.Size, *_: Any, **__: Any
) -> int:
    flops: int = sdpa_flop_count(query_shape, key_shape, value_shape)
    return flops


def _grouped_matmul_flops(rows_shape: torch.Size, weights_shape: torch.Size, *_: Any, **__: Any) -> int:
    # (rows, in) × (groups, in, out): each row meets the weight of its own group.
    return 2 * rows_shape[0] * weights_shape[-2] * weights_shape[-1]


# torch 2.13 counts neither the CPU's attention kernel nor grouped products.
_MISSING_FROM_TORCH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention_flops,
    torch.ops.aten._grouped_mm: _grouped_matmul_flops,
}
