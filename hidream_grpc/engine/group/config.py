"""What a rank group is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hidream_grpc.devices.detect import DeviceSelection
from hidream_grpc.devices.device_types import StartMethod
from hidream_grpc.engine.group.memory_gate import MemoryCheck
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.parallel.layout import Layout


def _any_memory_will_do(*_arguments: object) -> None:
    """Where nobody knows what the model needs."""


@dataclass(frozen=True, slots=True)
class GroupTimeouts:
    """How long the ranks may take, in seconds, before they count as dead.

    Attributes:
        load_seconds: from the start of a process to its weights on the device, with whatever it compiles;
            also of the zygote's imports.
        init_seconds: of each step of torch's init. A rank that dies meanwhile holds the others up
            for a few times this.
        join_seconds: from the command to join to the last rank's answer; also covers the work that a
            survivor ends first. Several times init_seconds.
        collective_seconds: of a collective within a plan: how far apart ranks may be. Also how long a rank
            may be at nothing, or in a loop, in a plan of a kind that it never did before.
        min_plan_seconds: the same for plans whose time is known, where ten times that is less.
        leave_seconds: to leave when told to.
    """

    load_seconds: float = 1800.0
    init_seconds: float = 5.0
    join_seconds: float = 120.0
    collective_seconds: float = 600.0
    min_plan_seconds: float = 5.0
    leave_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """A rank group.

    Attributes:
        model_path: a HiDream-I1 in diffusers format.
        extra_model_path: the Llama folder, where the checkpoint holds none.
        checkpoint_fingerprint: that their files must have whenever a rank loads them.
        devices: that the ranks may use; the first of them while they work, those beyond are spares.
        layout: how the ranks share the work.
        smaller_layouts: what to try, in this order, when too few devices work for `layout`.
        start_method: how the zygote makes ranks.
        replace: who is started again when a rank died: the dead alone, or all. "one" is proven on gloo.
        threads_per_rank: of torch, on the CPU.
        check_memory: whether ranks that start have room for what they load.
        compile_shapes: of the steps that each rank compiles for when it has loaded.
        timeouts: of everything that is waited for.
        log: how zygote and ranks log.
    """

    model_path: Path
    extra_model_path: Path | None = None
    checkpoint_fingerprint: str
    devices: DeviceSelection
    layout: Layout
    smaller_layouts: tuple[Layout, ...] = ()
    start_method: StartMethod = StartMethod.FORK
    replace: Literal["one", "all"] = "one"
    threads_per_rank: int = 1
    check_memory: MemoryCheck = _any_memory_will_do
    compile_shapes: tuple[StepShape, ...] = ()
    timeouts: GroupTimeouts = field(default_factory=GroupTimeouts)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if self.devices.num_ranks < self.layout.world_size:
            raise ValueError(f"{self.devices.num_ranks} devices for {self.layout.world_size} ranks")
