"""A machine with two NPUs, as far as devices/npu.py can tell.

The only double of this suite: no machine of ours has an NPU. test_npu_wheel.py proves that all it
offers is in the real package.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

NUM_DEVICES = 2
TOTAL_BYTES = 64 * 2**30


@dataclass
class NpuRuntime:
    """Stands for the module `torch_npu.npu`; its public methods are functions of that module."""

    _current_device: int | None = None
    _used_bytes: list[int] = field(default_factory=lambda: [0] * NUM_DEVICES)
    _cached_bytes: list[int] = field(default_factory=lambda: [0] * NUM_DEVICES)
    _synchronized_devices: list[int] = field(default_factory=list)

    def set_device(self, device: torch.device) -> None:
        self._current_device = self._index(device)

    def get_device_name(self, device_name: torch.device) -> str:
        # The real one answers for the current device, whatever it is asked for.
        assert self._index(device_name) == self._current_device
        return "Ascend910B4"

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        index = self._index(device)
        return TOTAL_BYTES - self._used_bytes[index] - self._cached_bytes[index], TOTAL_BYTES

    def synchronize(self, device: torch.device) -> None:
        self._synchronized_devices.append(self._index(device))

    def empty_cache(self) -> None:
        assert self._current_device is not None
        self._cached_bytes[self._current_device] = 0

    def _index(self, device: torch.device) -> int:
        assert device.type == "npu"
        index: int = device.index
        if index not in range(NUM_DEVICES):
            raise RuntimeError(f"Invalid device ID {index}")
        return index
