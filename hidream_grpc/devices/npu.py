"""A rank on an Ascend NPU. Nothing else imports torch_npu: it needs CANN.

Source: torch_npu 2.13.0, torch_npu/npu/__init__.py and utils.py; importing it registers the hccl
backend with torch.distributed.
"""

from __future__ import annotations

import torch
import torch_npu

from hidream_grpc.devices.base import NPU, Device, DeviceMemory

# What torch_npu's allocators say, and CANN's code for the same: some raise a plain RuntimeError with it.
_OUT_OF_MEMORY_TEXTS = ("NPU out of memory", "EL0004")


class NpuDevice:
    """One NPU."""

    backend = NPU.backend
    dtype = torch.bfloat16

    def __init__(self, local_index: int) -> None:
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


def open_device(local_index: int) -> Device:
    """Open an NPU and make it torch's current one."""
    return NpuDevice(local_index)
