"""An Ascend NPU as the device of a rank. Nothing else imports torch_npu: it needs CANN.

Source: torch_npu 2.13.0, torch_npu/npu/__init__.py and utils.py; importing it registers the hccl
backend with torch.distributed.
"""

from __future__ import annotations

from typing import cast

import torch
import torch_npu
from torch import Tensor

from hidream_grpc.devices import kernels
from hidream_grpc.devices.determinism import use_deterministic_kernels
from hidream_grpc.devices.device import Device
from hidream_grpc.devices.device_types import NPU, DeviceMemory

# What torch_npu's allocators say, and CANN's code for the same: some raise a plain RuntimeError with it.
_OUT_OF_MEMORY_TEXTS = ("NPU out of memory", "EL0004")


class NpuDevice:
    """The NPU of one rank."""

    backend = NPU.backend
    dtype = torch.bfloat16

    def __init__(self, local_index: int) -> None:
        use_deterministic_kernels()
        self.torch_device = torch.device("npu", local_index)
        torch_npu.npu.set_device(self.torch_device)
        self.name: str = torch_npu.npu.get_device_name(self.torch_device)

    def memory(self) -> DeviceMemory:
        """Memory of the NPU, as its driver counts it."""
        free_bytes, total_bytes = torch_npu.npu.mem_get_info(self.torch_device)
        return DeviceMemory(total_bytes=total_bytes, free_bytes=free_bytes)

    def synchronize(self) -> None:
        """Wait for all streams of the NPU."""
        torch_npu.npu.synchronize(self.torch_device)

    def empty_cache(self) -> None:
        """Give the allocator's unused blocks back to the driver."""
        torch_npu.npu.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise torch's own error, and those of CANN under it."""
        return isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)
        )

    def attention(self, query: Tensor, key: Tensor, value: Tensor, first_key_count: int) -> Tensor:
        """Use the fused kernel, which takes no bias: a key that counts more often is merged afterwards."""
        first_key = 0 if first_key_count == 1 else 1
        attended, softmax_max, softmax_sum, *_ = torch_npu.npu_fusion_attention(
            query,
            key[:, first_key:].contiguous(),
            value[:, first_key:].contiguous(),
            query.shape[2],
            "BSND",
            scale=query.shape[-1] ** -0.5,
        )
        if first_key_count == 1:
            return cast(Tensor, attended)
        # Both come as (B, H, T, 8), eight times the same.
        logsumexp = (softmax_max + softmax_sum.log())[..., 0].transpose(1, 2)
        return kernels.add_zero_key(attended, logsumexp, value[:, :1], first_key_count)

    def rotate(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Use the fused kernel, in float32."""
        num_rotated = 2 * cosines.shape[-1]
        cosines, sines = (of_pair.repeat_interleave(2, dim=-1)[None, :, None] for of_pair in (cosines, sines))
        rotated = torch_npu.npu_rotary_mul(
            x[..., :num_rotated].float(), cosines, sines, rotary_mode="interleave"
        )
        return torch.cat((rotated.to(x.dtype), x[..., num_rotated:]), dim=-1)

    def grouped_linear(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Use one kernel for all groups; ends in a tensor stay on the device, in a list they would not."""
        outputs: Tensor = torch_npu.npu_grouped_matmul(
            [rows],
            [weights.transpose(-2, -1)],
            group_list=ends.to(torch.int64),
            split_item=3,
            group_type=0,
            group_list_type=0,
        )[0]
        return outputs

    quantized_linear = staticmethod(kernels.quantized_linear)

    def quantized_grouped_linear(self, rows: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        """Dequantize the matrices of all groups at a time, for the kernel of exact ones."""
        return self.grouped_linear(rows, kernels.dequantize(weights, scales), ends)


def open_device(local_index: int) -> Device:
    """Open an NPU and make it torch's current one."""
    return NpuDevice(local_index)
