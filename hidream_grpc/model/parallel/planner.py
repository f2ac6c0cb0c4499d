"""Which layout a number of devices gets, and whether one that was asked for can be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from hidream_grpc.devices.detect import MAX_DEVICE_INDEX
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.parallel.layout import AXIS_KEYS, Layout

LAYOUT_FLAG = "--layout"

_MAX_WORLD_SIZE = MAX_DEVICE_INDEX + 1
_PREFERRED_TENSOR_PARALLEL = 4
_MIN_REPLICA_DEVICES = 8


@dataclass(frozen=True, slots=True)
class ModelDivisions:
    """Into how many parts a model can be divided.

    Shares of hidden units may differ from rank to rank, so they forbid no layout.

    Attributes:
        num_attention_heads: tensor parallel must divide them.
        num_routed_experts: expert parallel must divide them.
    """

    num_attention_heads: int
    num_routed_experts: int


def choose_layout(
    asked: str | None,
    num_devices: int | None,
    default: str,
    divisions: ModelDivisions,
    flag: str = LAYOUT_FLAG,
) -> Layout:
    """The layout to run, which may leave devices idle.

    Args:
        asked: by the operator, such as "tp=4,ep=2"; None has one planned.
        num_devices: that the operator named; None gives the layout as many as it needs.
        default: where the operator said neither; every model must allow it.
        divisions: of the model.
        flag: what the operator used to ask, for the error's text.

    Raises:
        ConfigurationError: what was asked for is no layout, or cannot be.
    """
    if asked is None:
        return parse_layout(default) if num_devices is None else plan_layout(num_devices, divisions)
    layout = parse_layout(asked, flag)
    check_layout(layout, layout.world_size if num_devices is None else num_devices, divisions, flag)
    return layout


def parse_layout(text: str, flag: str = LAYOUT_FLAG) -> Layout:
    """Read a layout such as "tp=2,ep=2,cfg=2": any of tp, ep, cfg and dp in any order, the others are 1.

    Raises:
        ConfigurationError: not such a layout.
    """
    sizes: dict[str, int] = {}
    for part in (part.strip() for part in text.split(",")):
        match = re.fullmatch(r"([a-z]+)=([1-9][0-9]{0,3})", part)
        if match is None or match[1] not in AXIS_KEYS:
            keys = ", ".join(AXIS_KEYS)
            raise ConfigurationError(
                flag, f"{part!r} in {text!r} is no axis: give {keys} a size from 1, such as tp=4,ep=2"
            )
        axis = AXIS_KEYS[match[1]]
        if axis in sizes:
            raise ConfigurationError(flag, f"{match[1]} is named twice in {text!r}")
        sizes[axis] = int(match[2])
    if sizes.get("cfg_parallel", 1) > 2:
        raise ConfigurationError(
            flag, f"cfg={sizes['cfg_parallel']} in {text!r}: guidance has two halves, so cfg is 1 or 2"
        )
    layout = Layout(**sizes)
    if layout.world_size > _MAX_WORLD_SIZE:
        raise ConfigurationError(
            flag, f"{text!r} needs {layout.world_size} devices, more than {_MAX_WORLD_SIZE}"
        )
    return layout


def plan_layout(num_devices: int, divisions: ModelDivisions) -> Layout:
    """The best layout that fits.

    Most devices in use come first, then tensor parallel as near to 4 as the heads allow (beyond, a share
    of a layer is too small for what its all-reduces cost), then few replicas. Expert parallel takes what
    is left: it costs no all-reduce in the attention. Replicas, which need the memory of a whole model
    each, have at least 8 devices. Guidance is not divided: expert parallel's groups take its halves. With
    20 heads and 4 experts:

        devices  1     2     4     5     8          16         24              32
        layout   tp=1  tp=2  tp=4  tp=5  tp=4,ep=2  tp=4,ep=4  tp=4,ep=2,dp=3  tp=4,ep=4,dp=2

    Args:
        num_devices: at least 1.
        divisions: of the model.
    """
    layouts = allowed_layouts(
        num_devices, divisions, max_data_parallel=max(1, num_devices // _MIN_REPLICA_DEVICES)
    )
    return max(
        (
            layout
            for layout in layouts
            if layout.data_parallel == 1 or layout.world_size >= _MIN_REPLICA_DEVICES * layout.data_parallel
        ),
        key=_preference,
    )


def smaller_layouts(full: Layout, divisions: ModelDivisions) -> tuple[Layout, ...]:
    """What can serve instead of a layout when devices are lost, down to one device; most devices first.

    Of the layouts with as many ranks the one whose axes change least, by their ratios: what a rank holds
    of the model, and so needs of memory, grows no more than it must.

    Args:
        full: that was asked for.
        divisions: of the model, which allow `full`.
    """
    by_size: dict[int, list[Layout]] = {}
    for layout in allowed_layouts(full.world_size - 1, divisions, full.cfg_parallel, full.data_parallel):
        by_size.setdefault(layout.world_size, []).append(layout)

    def change(layout: Layout) -> tuple[float, ...]:
        return (sum(_ratios(full, layout)), *(-value for value in _preference(layout)))

    return tuple(min(by_size[size], key=change) for size in sorted(by_size, reverse=True))


def check_layout(
    layout: Layout, num_devices: int, divisions: ModelDivisions, flag: str = LAYOUT_FLAG
) -> None:
    """See that a model on so many devices allows a layout; fewer ranks than devices are allowed.

    Raises:
        ConfigurationError: it does not. The text names the nearest layouts that it allows.
    """
    are = "is 1" if num_devices == 1 else f"are {num_devices}"
    reasons = []
    if divisions.num_attention_heads % layout.tensor_parallel:
        reasons.append(
            f"tp={layout.tensor_parallel} does not divide {divisions.num_attention_heads} attention heads"
        )
    if divisions.num_routed_experts % layout.expert_parallel:
        reasons.append(
            f"ep={layout.expert_parallel} does not divide {divisions.num_routed_experts} routed experts"
        )
    if layout.world_size > num_devices:
        reasons.append(f"{layout} needs {layout.world_size} devices, there {are}")
    if reasons:
        nearest = " or ".join(str(allowed) for allowed in _nearest(layout, num_devices, divisions))
        on = "1 device" if num_devices == 1 else f"{num_devices} devices"
        raise ConfigurationError(flag, f"{', '.join(reasons)}; {nearest} would work on {on}")


def _nearest(asked: Layout, num_devices: int, divisions: ModelDivisions) -> list[Layout]:
    """One or two that are allowed: that which uses most devices, that which changes least."""
    layouts = list(allowed_layouts(num_devices, divisions, asked.cfg_parallel, asked.data_parallel))

    def use(layout: Layout) -> tuple[float, ...]:
        return (layout.world_size, layout.cfg_parallel, layout.data_parallel, *_preference(layout))

    return list(dict.fromkeys((max(layouts, key=use), min(layouts, key=partial(_change, asked)))))


def _change(asked: Layout, layout: Layout) -> tuple[float, ...]:
    """How much a layout differs from the one that was asked for: first in how many axes."""
    ratios = _ratios(asked, layout)
    return (sum(ratio > 1 for ratio in ratios), sum(ratios), *(-value for value in _preference(layout)))


def _ratios(asked: Layout, layout: Layout) -> list[float]:
    """Of the sizes of each axis, from 1."""
    sizes = [(getattr(layout, axis), getattr(asked, axis)) for axis in AXIS_KEYS.values()]
    return [max(size / wanted, wanted / size) for size, wanted in sizes]


def allowed_layouts(
    num_devices: int, divisions: ModelDivisions, max_cfg_parallel: int = 1, max_data_parallel: int = 1
) -> Iterator[Layout]:
    """Every layout that a model allows on at most so many devices."""
    for tensor_parallel in _divisors(divisions.num_attention_heads):
        for expert_parallel in _divisors(divisions.num_routed_experts):
            for cfg_parallel in range(1, max_cfg_parallel + 1):
                room = num_devices // (tensor_parallel * expert_parallel * cfg_parallel)
                for data_parallel in range(1, min(room, max_data_parallel) + 1):
                    yield Layout(
                        cfg_parallel=cfg_parallel,
                        data_parallel=data_parallel,
                        expert_parallel=expert_parallel,
                        tensor_parallel=tensor_parallel,
                    )


def _preference(layout: Layout) -> tuple[float, ...]:
    """Greater is better, see `plan_layout`."""
    ratio = layout.tensor_parallel / _PREFERRED_TENSOR_PARALLEL
    return layout.world_size, -max(ratio, 1 / ratio), -layout.data_parallel, -layout.tensor_parallel


def _divisors(count: int) -> Iterator[int]:
    return (size for size in range(1, count + 1) if count % size == 0)
