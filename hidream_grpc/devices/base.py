"""What a device type is, and what a rank may ask of its device. Torch-free: the server imports it.

The server uses `DeviceType` (which backend, which environment, how ranks are started); a rank calls
`open_device` and works with the `Device` it gets.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    import torch


class StartMethod(StrEnum):
    """How the zygote, which has imported torch but opened no device, makes a rank of itself."""

    FORK = "fork"
    EXEC = "exec"


@dataclass(frozen=True, slots=True)
class DeviceType:
    """One kind of device that ranks run on.

    Attributes:
        name: as in `--device-type`.
        backend: of torch.distributed.
        start_method: FORK where a fork of an unopened runtime works, EXEC where that is not known.
        default_layout: where the operator names neither devices nor a layout, as `--layout` takes it;
            one that every model allows.
        visible_devices_variable: environment variable that hides devices from the runtime; None
            where devices are not counted and any number of ranks may be asked for.
        device_node_prefix: device N of this type is the file `/dev/<prefix>N`.
        rank_environment: environment defaults of the ranks, by the number of ranks.
        can_compile: whether torch.compile has been made to work on it here.
        bytes_per_weight: of the dtype that the model has on it.
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
)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of one device, of all processes that use it."""

    total_bytes: int
    free_bytes: int


class Device(Protocol):
    """The device of one rank, opened. Lives in the rank's process only."""

    @property
    def name(self) -> str:
        """What the hardware calls itself."""

    @property
    def backend(self) -> str:
        """Backend of torch.distributed for tensors of this device."""

    @property
    def torch_device(self) -> torch.device:
        """Where this rank's tensors live."""

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in here."""

    def memory(self) -> DeviceMemory:
        """Total and free memory, now; what torch has cached counts as used."""

    def synchronize(self) -> None:
        """Block until the device has finished all work that was given to it."""

    def empty_cache(self) -> None:
        """Give back the memory that torch holds for nobody; the next allocations are slower."""

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
    if device_type not in {CPU.name, CUDA.name, NPU.name}:
        raise ValueError(f"unknown device type {device_type!r}")
    module = importlib.import_module(f"hidream_grpc.devices.{device_type}")
    return cast(Device, module.open_device(local_index))
