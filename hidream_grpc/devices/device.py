"""A rank's device: what the model and the runner ask of it, whatever its type."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch

from hidream_grpc.devices.device_types import DEVICE_TYPES, DeviceMemory


class Device(Protocol):
    """The device of one rank, opened. Lives in the rank's process only."""

    @property
    def name(self) -> str:
        """The name that the hardware gives itself."""

    @property
    def backend(self) -> str:
        """The backend of torch.distributed for tensors of this device."""

    @property
    def torch_device(self) -> torch.device:
        """The torch device of this rank's tensors."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes on this device."""

    def memory(self) -> DeviceMemory:
        """Total and free memory, now; what torch has cached counts as used."""

    def synchronize(self) -> None:
        """Block until the device has finished all work that was given to it."""

    def empty_cache(self) -> None:
        """Give back the memory that torch holds in reserve; the next allocations are slower."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether the error says that this device had no room, so that less work may fit."""

    def attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first_key_count: int
    ) -> torch.Tensor:
        """Softmax attention without a mask.

        Args:
            query: (B, T, H, C).
            key, value: (B, S, H, C).
            first_key_count: how often key 0 counts; more than once only where it is all zeros.

        Returns:
            (B, T, H, C).
        """

    def rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding of neighbouring channel pairs; computed in float32 at least.

        Args:
            x: (B, T, H, C); channels beyond the rotated ones stay as they are.
            cosines, sines: (T, half the rotated channels).

        Returns:
            Shape and dtype of x.
        """

    def grouped_linear(self, rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiply groups of consecutive rows with a matrix each.

        Args:
            rows: (R, K).
            weights: (G, N, K).
            ends: (G,), int32, where each group ends; never read by the host on an accelerator.

        Returns:
            (R, N); rows after the last end are undefined.
        """

    def quantized_linear(
        self, inputs: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply a layer whose matrix is quantized; see `kernels.dequantize`.

        Args:
            inputs: (..., K), in the dtype of the computation.
            weights: (N, K), int8 or float8.
            scales: (N,), dtype of the inputs.
            bias: (N,), dtype of the inputs; None for none.

        Returns:
            (..., N), dtype of the inputs.
        """

    def quantized_grouped_linear(
        self, rows: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """Multiply as `grouped_linear` does, with quantized matrices: (G, N, K), and (G, N) of scales."""


def open_device(device_type: str, local_index: int) -> Device:
    """Open a device in this process and make it torch's current one.

    Imports torch, and the runtime of the device.

    Args:
        device_type: name of a `DeviceType`.
        local_index: among the devices visible to this process, from 0.

    Raises:
        ValueError: no such device type.
        ImportError, RuntimeError: the runtime's own, when it does not load or open the device.
    """
    if device_type not in DEVICE_TYPES:
        raise ValueError(f"unknown device type {device_type!r}")
    module = importlib.import_module(f"hidream_grpc.devices.{device_type}")
    return cast(Device, module.open_device(local_index))
