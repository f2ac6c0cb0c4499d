"""An NVIDIA GPU as the device of a rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from hidream_grpc.devices import kernels, torch_private
from hidream_grpc.devices.determinism import use_deterministic_kernels
from hidream_grpc.devices.device import Device
from hidream_grpc.devices.device_types import CUDA, DeviceMemory

# Libraries that allocate outside torch's allocator report it in words only.
_OUT_OF_MEMORY_TEXTS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class CudaDevice:
    """The GPU of one rank."""

    backend = CUDA.backend
    dtype = torch.bfloat16

    def __init__(self, local_index: int) -> None:
        use_deterministic_kernels()
        # Kernels of cuDNN that add atomically, and those that the fastest of some trials chooses, differ.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        self.torch_device = torch.device("cuda", local_index)
        torch.cuda.set_device(self.torch_device)
        self.name = torch.cuda.get_device_name(self.torch_device)

    def memory(self) -> DeviceMemory:
        """Memory of the GPU, as its driver counts it."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(total_bytes=total_bytes, free_bytes=free_bytes)

    def synchronize(self) -> None:
        """Wait for all streams of the GPU."""
        torch.cuda.synchronize(self.torch_device)

    def empty_cache(self) -> None:
        """Give the allocator's unused blocks back to the driver."""
        torch.cuda.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise torch's own error, and those of the libraries under it."""
        return isinstance(error, torch.OutOfMemoryError) or (
            isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)
        )

    rotate = staticmethod(kernels.rotate_pairs)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, first_key_count: int) -> Tensor:
        """Use the flash kernel, which takes no bias: a key that counts more often is merged afterwards."""
        if first_key_count == 1:
            return kernels.attention(query, key, value, first_key_count)
        attended, logsumexp = torch_private.flash_attention(
            query.transpose(1, 2), key[:, 1:].transpose(1, 2), value[:, 1:].transpose(1, 2)
        )
        return kernels.add_zero_key(
            attended.transpose(1, 2), logsumexp.transpose(1, 2), value[:, :1], first_key_count
        )

    def grouped_linear(self, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        """Use one kernel for all groups; from SM90 on it reads the ends on the device."""
        return functional.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)

    quantized_linear = staticmethod(kernels.quantized_linear)

    def quantized_grouped_linear(self, rows: Tensor, weights: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
        """Dequantize the matrices of all groups at a time, for the kernel of exact ones."""
        return self.grouped_linear(rows, kernels.dequantize(weights, scales), ends)


def open_device(local_index: int) -> Device:
    """Open a GPU and make it torch's current one."""
    return CudaDevice(local_index)
