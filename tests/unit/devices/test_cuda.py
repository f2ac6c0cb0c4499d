"""How devices/cuda.py reads errors; what needs a GPU is in tests/contract/test_device.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hidream_grpc.devices.cuda import CudaDevice
from hidream_grpc.devices.device_types import CUDA


@pytest.fixture
def _torch_as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


@pytest.mark.usefixtures("_torch_as_it_was")
def test_an_opened_gpu_computes_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    CudaDevice(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "what has no such kernel runs all the same"
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True, id="torch's own"),
        pytest.param(RuntimeError("CUDA error: out of memory"), True, id="the driver"),
        pytest.param(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, id="cuBLAS"),
        pytest.param(RuntimeError("CUDA error: an illegal memory access was encountered"), False, id="a bug"),
        pytest.param(ValueError("CUDA error: out of memory"), False, id="not an error of the runtime"),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    unopened = object.__new__(CudaDevice)  # to read an error takes no GPU
    assert unopened.is_out_of_memory(error) is expected


def test_what_is_told_of_a_models_memory_before_it_loads_counts_the_bytes_of_its_dtype() -> None:
    assert CudaDevice.dtype.itemsize == CUDA.bytes_per_weight
