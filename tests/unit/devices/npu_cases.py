"""The logic of devices/npu.py, on a stand-in for torch_npu. `test_npu.py` runs it in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch.utils.backend_registration import rename_privateuse1_backend

from hidream_grpc.devices.device import open_device
from hidream_grpc.devices.device_types import NPU
from tests.unit.devices.npu_stand_in import TOTAL_BYTES, NpuRuntime


@pytest.fixture
def npu_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[NpuRuntime]:
    # As torch_npu does when it is imported; torch allows it more than once with one name.
    rename_privateuse1_backend("npu")
    runtime = NpuRuntime()
    torch_npu = ModuleType("torch_npu")
    torch_npu.npu = runtime  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
    yield runtime
    # It holds the stand-in: the next test imports it anew.
    sys.modules.pop("hidream_grpc.devices.npu", None)


def test_opening_makes_the_npu_the_current_one_and_names_it(npu_runtime: NpuRuntime) -> None:
    device = open_device("npu", 1)
    assert npu_runtime._current_device == 1
    assert device.torch_device == torch.device("npu", 1)
    assert device.name == "Ascend910B4"


def test_an_opened_npu_computes_in_a_fixed_order(npu_runtime: NpuRuntime) -> None:
    torch.use_deterministic_algorithms(False)
    open_device("npu", 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled(), "what has no such kernel runs all the same"


def test_ranks_on_npus_talk_hccl_and_compute_in_bfloat16(npu_runtime: NpuRuntime) -> None:
    device = open_device("npu", 0)
    assert device.backend == "hccl"
    assert device.dtype is torch.bfloat16
    assert device.dtype.itemsize == NPU.bytes_per_weight


def test_memory_is_that_of_the_rank_s_own_npu(npu_runtime: NpuRuntime) -> None:
    npu_runtime._used_bytes = [7 * 2**30, 40 * 2**30]
    memory = open_device("npu", 1).memory()
    assert memory.total_bytes == TOTAL_BYTES
    assert memory.free_bytes == 24 * 2**30


def test_synchronize_waits_for_the_rank_s_own_npu(npu_runtime: NpuRuntime) -> None:
    open_device("npu", 1).synchronize()
    assert npu_runtime._synchronized_devices == [1]


def test_emptying_the_cache_makes_memory_free(npu_runtime: NpuRuntime) -> None:
    device = open_device("npu", 1)
    npu_runtime._cached_bytes[1] = 5 * 2**30
    assert device.memory().free_bytes == TOTAL_BYTES - 5 * 2**30
    device.empty_cache()
    assert device.memory().free_bytes == TOTAL_BYTES


def test_an_npu_that_does_not_exist_is_the_runtime_s_own_error(npu_runtime: NpuRuntime) -> None:
    with pytest.raises(RuntimeError, match="Invalid device ID 2"):
        open_device("npu", 2)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(torch.OutOfMemoryError("NPU out of memory. Tried to allocate"), True, id="torch's own"),
        pytest.param(
            RuntimeError("NPU out of memory. NPUWorkspaceAllocator tried to allocate 2.00 GiB"),
            True,
            id="workspace",
        ),
        pytest.param(RuntimeError("EL0004: [PID: 7] Failed to allocate memory."), True, id="CANN's code"),
        pytest.param(RuntimeError("EI0006: Getting socket times out."), False, id="a collective"),
        pytest.param(ValueError("NPU out of memory"), False, id="not an error of the runtime"),
    ],
)
def test_out_of_memory_is_told_from_other_errors(
    npu_runtime: NpuRuntime, error: Exception, expected: bool
) -> None:
    assert open_device("npu", 0).is_out_of_memory(error) is expected
