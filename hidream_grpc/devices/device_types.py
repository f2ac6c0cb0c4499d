"""The kinds of devices that ranks run on, as the server knows them: backend, environment, start of a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

MAX_DEQUANTIZED_WEIGHTS = 2**26
"""Most weights of a linear layer that are dequantized at a time: 128 MiB in bfloat16. Experts may be more."""


class StartMethod(StrEnum):
    """How the zygote, which has imported torch but opened no device, makes a rank of itself."""

    FORK = "fork"
    EXEC = "exec"


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """How fast devices of one type compute, and exchange what they computed.

    Attributes:
        flops_per_second: floating-point operations of one device, in products of large matrices.
        bytes_per_second: bytes that one device sends to another one of the group.
    """

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class DeviceType:
    """One kind of device that ranks run on.

    Attributes:
        name: as in `--device-type`.
        backend: the one of torch.distributed for its tensors.
        start_method: FORK where a fork of an unopened runtime works, EXEC where that is not known.
        default_layout: used where the operator names neither devices nor a layout, as `--layout` takes it;
            one that every model allows.
        visible_devices_variable: environment variable that hides devices from the runtime; None
            where devices are not counted and any number of ranks may be asked for.
        device_node_prefix: device N of this type is the file `/dev/<prefix>N`.
        rank_environment: environment defaults of the ranks, by the number of ranks.
        can_compile: whether torch.compile has been made to work on it here.
        bytes_per_weight: size of the dtype that the model has on it.
        has_float8: whether its torch converts numbers of 8 bits with a floating point.
        runtime_bytes: what a rank needs for its process on a CPU, else for the workspaces of kernels and
            collectives and for what the allocator cannot use.
        speed: the speed by which layouts are compared.
    """

    name: str
    backend: str
    start_method: StartMethod
    default_layout: str
    visible_devices_variable: str | None
    device_node_prefix: str
    rank_environment: Callable[[int], dict[str, str]]
    can_compile: bool
    bytes_per_weight: int
    has_float8: bool
    runtime_bytes: int
    speed: DeviceSpeed

    def environment(self, num_ranks: int) -> dict[str, str]:
        """Environment defaults of the ranks; each applies only where the operator set nothing.

        They must be set before torch is imported.
        """
        return {
            "TOKENIZERS_PARALLELISM": "false",
            # Installed beside torch, torch_npu is imported by `import torch` itself, which needs CANN
            # and would open it in the zygote: devices/npu.py imports it, in the rank.
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        } | self.rank_environment(num_ranks)


def _cuda_environment(_num_ranks: int) -> dict[str, str]:
    return {
        # 3, the default, ends every surviving rank when one dies.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
        # A library that asks torch.cuda.is_available() in the zygote must not open the runtime there.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # cuBLAS adds in a fixed order only in workspaces of a fixed size: 8 of 4 MiB.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def _npu_environment(num_ranks: int) -> dict[str, str]:
    return {
        "HCCL_TIMEOUT": "7200",
        "HCCL_BUFFSIZE": "2048",
        "HCCL_SINGLE_NODE": "1",
        "HCCL_LOCAL_RANK_NUM": str(num_ranks),
        "HCCL_WHITELIST_DISABLE": "1",
        "ACL_STREAM_TIMEOUT": "7200",
        "PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:512",
        "DEVICE_COUNT": str(num_ranks),
        # Reductions over ranks, and sums within a matrix product, in a fixed order.
        "HCCL_DETERMINISTIC": "true",
        "CLOSE_MATMUL_K_SHIFT": "1",
    }


# Only their ratio decides. It is that of two cards on which others measured this model, 13.4 s with tp=2 and
# 7.1 s with cfg=2: sending 4.28 GB took 0.89 times as long as computing 75.9 TFLOP.
_ACCELERATOR_SPEED = DeviceSpeed(flops_per_second=150e12, bytes_per_second=10e9)

CPU = DeviceType(
    name="cpu",
    backend="gloo",
    start_method=StartMethod.FORK,
    # Over gloo the all-reduces of tensor parallel cost more than its shares save: docs/decisions/0004.
    default_layout="cfg=2",
    visible_devices_variable=None,
    device_node_prefix="",
    rank_environment=lambda _num_ranks: {},
    can_compile=True,
    bytes_per_weight=4,
    has_float8=True,
    runtime_bytes=256 * 1024**2,
    # Of one core, and of gloo: docs/decisions/0004.
    speed=DeviceSpeed(flops_per_second=0.1e12, bytes_per_second=0.3e9),
)
CUDA = DeviceType(
    name="cuda",
    backend="nccl",
    # CUDA survives a fork as long as the parent has not initialised it.
    start_method=StartMethod.FORK,
    default_layout="tp=1",
    visible_devices_variable="CUDA_VISIBLE_DEVICES",
    device_node_prefix="nvidia",
    rank_environment=_cuda_environment,
    can_compile=True,
    bytes_per_weight=2,
    has_float8=True,
    runtime_bytes=512 * 1024**2,
    speed=_ACCELERATOR_SPEED,
)
NPU = DeviceType(
    name="npu",
    backend="hccl",
    # CANN documents no fork, not even of a process that has not opened a device.
    start_method=StartMethod.EXEC,
    default_layout="tp=1",
    visible_devices_variable="ASCEND_RT_VISIBLE_DEVICES",
    device_node_prefix="davinci",
    rank_environment=_npu_environment,
    # torch_npu has two backends for graphs; neither has been run with this model: docs/decisions/0005.
    can_compile=False,
    bytes_per_weight=2,
    # Ascend's generations that most operators have compute no float8.
    has_float8=False,
    runtime_bytes=512 * 1024**2,
    speed=_ACCELERATOR_SPEED,
)
DEVICE_TYPES = {device_type.name: device_type for device_type in (NPU, CUDA, CPU)}
"""All device types by name, in the order in which `--device-type auto` looks for them."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device, counted over all processes that use it."""

    total_bytes: int
    free_bytes: int
