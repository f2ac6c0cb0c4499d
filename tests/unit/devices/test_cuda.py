"""How devices/cuda.py reads errors; what needs a GPU is in tests/contract/test_device.py."""

from __future__ import annotations

import pytest
import torch

from hidream_grpc.devices.base import CUDA
from hidream_grpc.devices.cuda import CudaDevice


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
