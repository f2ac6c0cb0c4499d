"""Which layout a number of devices gets, and whether a requested layout is possible."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import product

from hidream_grpc.devices.detect import MAX_DEVICE_INDEX
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.parallel.layout import AXIS_KEYS, Layout

LAYOUT_FLAG = "--layout"

_MAX_WORLD_SIZE = MAX_DEVICE_INDEX + 1
_PREFERRED_TENSOR_PARALLEL = 4
_MIN_REPLICA_DEVICES = 8


class LayoutWord(StrEnum):
    """How `--layout` may choose a layout without naming it.

    TABLE is the one of the server that this one replaces. AUTO has the least time for a single caller,
    THROUGHPUT the most images a second for many.
    """

    TABLE = "table"
    AUTO = "auto"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class ModelDivisions:
    """The numbers that decide into how many parts a model can be divided.

    Shares of hidden units may differ from rank to rank, so they forbid no layout.

    Attributes:
        num_attention_heads: tensor parallel must divide them, and sequence parallel the share of a rank.
        num_routed_experts: expert parallel must divide them.
    """

    num_attention_heads: int
    num_routed_experts: int


def choose_layout(
    asked: str | None,
    num_devices: int | None,
    default: str,
    divisions: ModelDivisions,
) -> Layout:
    """Choose the layout to run, which may leave devices idle.

    Args:
        asked: the layout that the operator requested, such as "tp=4,ep=2"; None to plan one.
        num_devices: number of devices that the operator named; None for as many as the layout needs.
        default: the layout where the operator named neither; every model must allow it.
        divisions: how the model can be divided.

    Raises:
        ConfigurationError: the request is no layout, or is impossible.
    """
    if asked is None:
        return parse_layout(default) if num_devices is None else plan_layout(num_devices, divisions)
    layout = parse_layout(asked)
    check_layout(layout, layout.world_size if num_devices is None else num_devices, divisions)
    return layout


def parse_layout(text: str) -> Layout:
    """Read a layout such as "cfg=2,sp=2": any of tp, ep, cfg, sp and dp in any order, the others are 1.

    Raises:
        ConfigurationError: the text is no such layout.
    """
    sizes: dict[str, int] = {}
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"([a-z]+)=([1-9][0-9]{0,3})", part)
        if match is None or match[1] not in AXIS_KEYS:
            keys = ", ".join(AXIS_KEYS)
            raise ConfigurationError(
                LAYOUT_FLAG,
                f"{part!r} in {text!r} is no axis: give {keys} a size from 1, such as tp=4,ep=2, "
                f"or name one of {', '.join(LayoutWord)}",
            )
        axis = AXIS_KEYS[match[1]]
        if axis in sizes:
            raise ConfigurationError(LAYOUT_FLAG, f"{match[1]} is named twice in {text!r}")
        sizes[axis] = int(match[2])
    if sizes.get("cfg_parallel", 1) > 2:
        raise ConfigurationError(
            LAYOUT_FLAG, f"cfg={sizes['cfg_parallel']} in {text!r}: guidance has two halves, so cfg is 1 or 2"
        )
    layout = Layout(**sizes)
    if layout.world_size > _MAX_WORLD_SIZE:
        raise ConfigurationError(
            LAYOUT_FLAG, f"{text!r} needs {layout.world_size} devices, more than {_MAX_WORLD_SIZE}"
        )
    return layout


def plan_layout(num_devices: int, divisions: ModelDivisions) -> Layout:
    """Plan the best layout for a number of devices.

    It uses as many devices as possible; then tensor parallel as near to 4 as the heads allow, since beyond
    that a share of a layer is too small for the cost of its all-reduces; then few replicas. Expert parallel
    takes the rest: it needs no all-reduce in the attention. A replica, which needs the memory of a whole
    model, has at least 8 devices. Guidance is not divided, since the groups of expert parallel take its
    halves. With 20 heads and 4 experts:

        devices  1     2     4     5     8          16         24              32
        layout   tp=1  tp=2  tp=4  tp=5  tp=4,ep=2  tp=4,ep=4  tp=4,ep=2,dp=3  tp=4,ep=4,dp=2

    Args:
        num_devices: number of devices, at least 1.
        divisions: how the model can be divided.
    """
    most = Layout(data_parallel=max(1, num_devices // _MIN_REPLICA_DEVICES))
    layouts = allowed_layouts(num_devices, divisions, most)
    return max(
        (
            layout
            for layout in layouts
            if layout.data_parallel == 1 or layout.world_size >= _MIN_REPLICA_DEVICES * layout.data_parallel
        ),
        key=_preference,
    )


def check_layout(layout: Layout, num_devices: int, divisions: ModelDivisions) -> None:
    """Check that a model on so many devices allows a layout; it may have fewer ranks than devices.

    Raises:
        ConfigurationError: the layout is not allowed; the text names the nearest ones that are.
    """
    are = "is 1" if num_devices == 1 else f"are {num_devices}"
    reasons = []
    if divisions.num_attention_heads % layout.tensor_parallel:
        reasons.append(
            f"tp={layout.tensor_parallel} does not divide {divisions.num_attention_heads} attention heads"
        )
    elif (heads := divisions.num_attention_heads // layout.tensor_parallel) % layout.sequence_parallel:
        reasons.append(f"sp={layout.sequence_parallel} does not divide the {heads} attention heads of a rank")
    if divisions.num_routed_experts % layout.expert_parallel:
        reasons.append(
            f"ep={layout.expert_parallel} does not divide {divisions.num_routed_experts} routed experts"
        )
    if layout.world_size > num_devices:
        reasons.append(f"{layout} needs {layout.world_size} devices, there {are}")
    if reasons:
        nearest = " or ".join(str(allowed) for allowed in _nearest(layout, num_devices, divisions))
        on = "1 device" if num_devices == 1 else f"{num_devices} devices"
        raise ConfigurationError(LAYOUT_FLAG, f"{', '.join(reasons)}; {nearest} would work on {on}")


def _nearest(asked: Layout, num_devices: int, divisions: ModelDivisions) -> list[Layout]:
    """One or two allowed layouts: the one that uses most devices, and the one that changes least."""
    layouts = list(allowed_layouts(num_devices, divisions, asked))

    def use(layout: Layout) -> tuple[float, ...]:
        axes = (layout.cfg_parallel, layout.sequence_parallel, layout.data_parallel)
        return (layout.world_size, *axes, *_preference(layout))

    return list(dict.fromkeys((max(layouts, key=use), min(layouts, key=partial(_change, asked)))))


def _change(asked: Layout, layout: Layout) -> tuple[float, ...]:
    """How much a layout differs from the requested one: by the number of axes, then by their ratios."""
    ratios = _ratios(asked, layout)
    return (sum(ratio > 1 for ratio in ratios), sum(ratios), *(-value for value in _preference(layout)))


def _ratios(asked: Layout, layout: Layout) -> list[float]:
    """For each axis the ratio of the larger size to the smaller one."""
    sizes = [(getattr(layout, axis), getattr(asked, axis)) for axis in AXIS_KEYS.values()]
    return [max(size / wanted, wanted / size) for size, wanted in sizes]


def allowed_layouts(num_devices: int, divisions: ModelDivisions, most: Layout) -> Iterator[Layout]:
    """Every layout that a model allows on at most so many devices.

    Args:
        num_devices: number of devices.
        divisions: how the model can be divided.
        most: the largest sizes of cfg, sequence and data parallel; those of its other axes limit nothing.
    """
    for tensor_parallel in _divisors(divisions.num_attention_heads):
        for expert_parallel, cfg_parallel, sequence_parallel in product(
            _divisors(divisions.num_routed_experts),
            range(1, most.cfg_parallel + 1),
            _divisors(divisions.num_attention_heads // tensor_parallel),
        ):
            if sequence_parallel > most.sequence_parallel:
                continue
            room = num_devices // (tensor_parallel * expert_parallel * cfg_parallel * sequence_parallel)
            for data_parallel in range(1, min(room, most.data_parallel) + 1):
                yield Layout(
                    cfg_parallel=cfg_parallel,
                    data_parallel=data_parallel,
                    expert_parallel=expert_parallel,
                    sequence_parallel=sequence_parallel,
                    tensor_parallel=tensor_parallel,
                )


def _preference(layout: Layout) -> tuple[float, ...]:
    """Rank of a layout in the order of `plan_layout`; greater is better."""
    ratio = layout.tensor_parallel / _PREFERRED_TENSOR_PARALLEL
    return layout.world_size, -max(ratio, 1 / ratio), -layout.data_parallel, -layout.tensor_parallel


def _divisors(count: int) -> Iterator[int]:
    return (size for size in range(1, count + 1) if count % size == 0)
