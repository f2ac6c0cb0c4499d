"""The configuration of a rank group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hidream_grpc.devices.detect import DeviceSelection
from hidream_grpc.devices.device_types import StartMethod
from hidream_grpc.engine.group.memory_gate import LayoutChoice, MemoryCheck
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.weight_format import WeightFormats


def _reserve_nothing(_layout: Layout) -> int:
    """Leave nothing free: the default where the needs of the model are not known."""
    return 0


def _accept_any_memory(*_arguments: object) -> None:
    """Check no memory: the default where the needs of the model are not known."""


@dataclass(frozen=True, slots=True)
class GroupTimeouts:
    """Seconds after which ranks count as dead.

    Attributes:
        load_seconds: for a rank from its start to its weights on the device, compilation included; also for
            the zygote's imports.
        init_seconds: for each step of torch's init. When a rank dies meanwhile, the others wait several times
            this long.
        join_seconds: from the command to join to the last rank's answer, including the work that a survivor
            finishes first; several times init_seconds.
        collective_seconds: for a collective within a plan, so how far apart ranks may be. Also how long a
            rank may be idle, or compute, in a plan of a kind that was not run before.
        min_plan_seconds: the least that a rank may be idle, or compute, in a plan whose usual duration is
            known; otherwise ten times that duration.
        leave_seconds: for a rank to end after `Leave`.
    """

    load_seconds: float = 1800.0
    init_seconds: float = 5.0
    join_seconds: float = 120.0
    collective_seconds: float = 600.0
    min_plan_seconds: float = 5.0
    leave_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """Everything that a rank group is started with.

    Attributes:
        model_path: a HiDream-I1 in diffusers format.
        extra_model_path: the Llama folder, where the checkpoint holds none.
        checkpoint_fingerprint: the fingerprint that the checkpoint must have whenever a rank loads it.
        weights: the formats in which the ranks hold the weights.
        devices: the devices that the ranks may use; the first ones are used, the others are spares.
        layout: how the ranks share the work.
        smaller_layouts: layouts to try, in this order, when too few devices work for `layout`.
        layout_instead: chooses the layout again, once the memory of its devices is known; None where the
            operator named it.
        start_method: how the zygote starts ranks.
        replace: which ranks are started again when one died: that one, or all. "one" is proven on gloo.
        threads_per_rank: CPU threads of torch in each rank.
        check_memory: raises where the ranks that start have no room for what they load.
        reserve_bytes: memory of a device that stays free of text encoders in a layout, to work in.
        compile_shapes: the shapes of steps that each rank compiles for once it has loaded.
        image_metadata: what the files of images say of themselves.
        timeouts: the time limits of everything that the server waits for.
        log: how zygote and ranks log.
    """

    model_path: Path
    extra_model_path: Path | None = None
    checkpoint_fingerprint: str
    weights: WeightFormats = field(default_factory=WeightFormats)
    devices: DeviceSelection
    layout: Layout
    smaller_layouts: tuple[Layout, ...] = ()
    layout_instead: LayoutChoice | None = None
    start_method: StartMethod = StartMethod.FORK
    replace: Literal["one", "all"] = "one"
    threads_per_rank: int = 1
    check_memory: MemoryCheck = _accept_any_memory
    reserve_bytes: Callable[[Layout], int] = _reserve_nothing
    compile_shapes: tuple[StepShape, ...] = ()
    image_metadata: ImageMetadata = field(default_factory=ImageMetadata)
    timeouts: GroupTimeouts = field(default_factory=GroupTimeouts)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.devices.num_ranks < self.layout.world_size:
            raise ValueError(f"{self.devices.num_ranks} devices for {self.layout.world_size} ranks")
