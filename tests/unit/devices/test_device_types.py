"""What the server learns about a device type before any rank exists."""

from __future__ import annotations

import pytest

from hidream_grpc.devices.device import open_device
from hidream_grpc.devices.device_types import CPU, CUDA, NPU, DeviceType, StartMethod


@pytest.mark.parametrize(
    ("device_type", "backend", "variable", "start_method"),
    [
        pytest.param(CPU, "gloo", None, StartMethod.FORK, id="cpu"),
        pytest.param(CUDA, "nccl", "CUDA_VISIBLE_DEVICES", StartMethod.FORK, id="cuda"),
        pytest.param(NPU, "hccl", "ASCEND_RT_VISIBLE_DEVICES", StartMethod.EXEC, id="npu"),
    ],
)
def test_each_type_has_its_own_backend_variable_and_way_to_start_ranks(
    device_type: DeviceType, backend: str, variable: str | None, start_method: StartMethod
) -> None:
    assert device_type.backend == backend
    assert device_type.visible_devices_variable == variable
    assert device_type.start_method is start_method


def test_npu_ranks_get_the_documented_environment() -> None:
    assert NPU.environment(num_ranks=4) == {
        "HCCL_TIMEOUT": "7200",
        "HCCL_BUFFSIZE": "2048",
        "HCCL_SINGLE_NODE": "1",
        "HCCL_LOCAL_RANK_NUM": "4",
        "HCCL_WHITELIST_DISABLE": "1",
        "ACL_STREAM_TIMEOUT": "7200",
        "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:512",
        "TOKENIZERS_PARALLELISM": "false",
        "DEVICE_COUNT": "4",
        "HCCL_DETERMINISTIC": "true",
        "CLOSE_MATMUL_K_SHIFT": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def test_a_library_that_looks_for_gpus_does_not_open_cuda_before_the_fork() -> None:
    assert CUDA.environment(num_ranks=2)["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


def test_cublas_gets_workspaces_in_which_it_adds_in_a_fixed_order() -> None:
    assert CUDA.environment(num_ranks=2)["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_dead_cuda_rank_does_not_end_the_others() -> None:
    assert CUDA.environment(num_ranks=2)["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"


def test_opening_an_unknown_type_says_which() -> None:
    with pytest.raises(ValueError, match="unknown device type 'tpu'"):
        open_device("tpu", 0)
