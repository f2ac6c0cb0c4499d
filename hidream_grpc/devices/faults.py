"""Tells an error of a device from one of what was computed on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hidream_grpc.devices.device import Device


def is_out_of_memory(error: BaseException, device: Device) -> bool:
    """Whether an error, or one that led to it, says that an open device or its host had no room."""
    return any(
        isinstance(cause, MemoryError) or device.is_out_of_memory(cause) for cause in _with_causes(error)
    )


def is_device_fault(error: BaseException, device: Device) -> bool:
    """Whether an error says that an open device has failed, or that it or its host had no room.

    Runtimes raise a plain RuntimeError, as torch does for a wrong shape. The device makes the difference: one
    that has failed refuses all further work.
    """
    if is_out_of_memory(error, device):
        return True
    if any(isinstance(cause, torch.AcceleratorError) for cause in _with_causes(error)):
        return True
    try:
        torch.ones(1, device=device.torch_device).add_(1).item()
        device.synchronize()
    except RuntimeError:
        return True
    return False


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
