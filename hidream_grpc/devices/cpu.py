"""The CPU as the device of a rank."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from hidream_grpc.devices import kernels
from hidream_grpc.devices.device import Device
from hidream_grpc.devices.device_types import CPU, DeviceMemory
from hidream_grpc.devices.host_memory import colon_separated, host_memory


class CpuDevice:
    """The whole machine's CPU, shared by all ranks on it."""

    backend = CPU.backend
    torch_device = torch.device("cpu")
    # bfloat16 is emulated on most CPUs: slower than float32, and less exact.
    dtype = torch.float32

    def __init__(self) -> None:
        self.name = _processor_name()

    def memory(self) -> DeviceMemory:
        """Memory of the machine, or of the container."""
        return host_memory()

    def synchronize(self) -> None:
        """Return at once: work on a CPU is done when its call returns."""

    def empty_cache(self) -> None:
        """Do nothing: torch caches no memory on a CPU."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise the allocator's error, which torch raises as a plain RuntimeError here."""
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
        )

    attention = staticmethod(kernels.attention)
    # Its loop over sizes that only the routing knows would be one graph for each outcome.
    grouped_linear = staticmethod(torch.compiler.disable(kernels.grouped_linear))  # type: ignore[no-untyped-call]
    quantized_linear = staticmethod(kernels.quantized_linear)
    quantized_grouped_linear = staticmethod(
        torch.compiler.disable(kernels.quantized_grouped_linear)  # type: ignore[no-untyped-call]
    )

    def rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Rotate by one product of complex numbers: a third of the passes over memory that real ones need."""
        # In a graph the real ones are one pass, and complex ones leave it.
        if (
            torch.compiler.is_compiling()
            or x.shape[-1] != 2 * cosines.shape[-1]
            or x.dtype not in {torch.float32, torch.float64}
        ):
            return kernels.rotate_pairs(x, cosines, sines)
        rotation = torch.complex(cosines.to(x.dtype), sines.to(x.dtype))[:, None]
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2)


def open_device(_local_index: int) -> Device:
    """Open the CPU; all ranks share it."""
    return CpuDevice()


def _processor_name() -> str:
    # Arm kernels give no "model name".
    return colon_separated(Path("/proc/cpuinfo")).get("model name") or platform.machine()
