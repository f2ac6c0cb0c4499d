"""Figure 6 of the design: what each rank of a layout computes, holds, reads and sends ÷ one device.

The layouts are those that 1, 2, 4 and 8 devices get, the transformer has the real model's dimensions, and
a step is one image of 1024×1024 with guidance. Everything is counted on tensors without memory, with each
expert getting equally many tokens; `tests/numerics/test_layout_costs.py` holds the same counters against
real ranks. Prints one JSON line: for each layout the largest value of any rank, and its share of what one
device does. Of the weights 1/N + 5 % is the goal.

    python -m scripts.bench.layouts [--devices 1,2,4,8] [--width 1024] [--height 1024]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any

import torch
import typer
from torch import Size

from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.loading import quieten_libraries
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import ModelDivisions, plan_layout
from hidream_grpc.model.parallel.rows import gather_rows
from hidream_grpc.model.parallel.shards import TensorSlice, parameter_slices
from hidream_grpc.model.transformer.model import HiDreamTransformer
from scripts.bench.counting import CountingAxis, MetaDevice, count_bytes_sent, counted_flops
from scripts.bench.flops import HIDREAM_I1_CONFIG, VAE_SCALE_FACTOR
from scripts.bench.forwards import (
    ForwardInputs,
    condition,
    exact_transformer,
    library_transformer,
    random_inputs,
    rank_rows,
)
from scripts.bench.report import Value, report, say

DTYPE = torch.bfloat16
NUM_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class RankCosts:
    """What one step costs one rank.

    Attributes:
        flops: multiply-adds count as two.
        weight_bytes_held: of the transformer, on the device.
        weight_bytes_read: of its slices in the checkpoint's files.
        bytes_sent: in all collectives of the step.
    """

    flops: int
    weight_bytes_held: int
    weight_bytes_read: int
    bytes_sent: int


def rank_costs(
    config: Mapping[str, Any],
    shapes: Mapping[str, Size],
    layout: Layout,
    rank: int,
    sample: Sample,
    num_samples: int,
    dtype: torch.dtype,
) -> RankCosts:
    """Count what one rank does, without memory and without other ranks.

    Args:
        config: content of the transformer's `config.json`.
        shapes: of the tensors of such a checkpoint.
        layout: of the group.
        rank: of the world.
        sample: size of the step's samples.
        num_samples: of the step; the sample groups share them equally.
        dtype: of the model and of the checkpoint.
    """
    groups = ParallelGroups(layout, rank)
    axes = count_bytes_sent(groups)
    device = MetaDevice(dtype, config["num_routed_experts"])
    transformer = exact_transformer(config, device, groups)
    weight_bytes_read = dtype.itemsize * sum(
        _num_elements(part, shapes[part.name])
        for parts in parameter_slices(transformer).values()
        for part in parts
    )
    inputs = random_inputs(
        config, sample, num_samples // layout.num_sample_groups, device.torch_device, dtype
    )
    return step_costs(transformer, groups, axes, inputs, weight_bytes_read)


def step_costs(
    transformer: HiDreamTransformer,
    groups: ParallelGroups,
    axes: Sequence[CountingAxis],
    inputs: ForwardInputs,
    weight_bytes_read: int,
) -> RankCosts:
    """Count what a rank does in one step; all ranks of its axes must call it, where there are others.

    Args:
        transformer: of the rank, filled or on meta.
        groups: of the rank.
        axes: of these groups.
        inputs: of the rank's samples.
        weight_bytes_read: when the transformer was filled.
    """
    conditioning = condition(transformer, inputs)
    rows = rank_rows(transformer, inputs, conditioning, groups.layout.expert_parallel)
    before = sum(axis.bytes_sent for axis in axes)

    def step() -> None:
        velocity = transformer(rows)
        gather_rows(velocity, len(velocity) * groups.samples.size, groups)

    flops = counted_flops(step)
    return RankCosts(
        flops=flops,
        weight_bytes_held=sum(parameter.nbytes for parameter in transformer.parameters()),
        weight_bytes_read=weight_bytes_read,
        bytes_sent=sum(axis.bytes_sent for axis in axes) - before,
    )


def checkpoint_shapes(config: Mapping[str, Any]) -> dict[str, Size]:
    """Shapes of the tensors of the library's transformer."""
    transformer = library_transformer(config, torch.float32)
    return {name: parameter.shape for name, parameter in transformer.named_parameters()}


def _num_elements(part: TensorSlice, shape: Size) -> int:
    sides = list(shape)
    for dimension, kept in enumerate((part.rows, part.columns)):
        if kept is not None:
            sides[dimension] = len(kept)
    return prod(sides)


@torch.inference_mode()
def main(
    devices: Annotated[str, typer.Option(help="numbers of devices, with commas between")] = "1,2,4,8",
    width: Annotated[int, typer.Option(help="in pixels")] = 1024,
    height: Annotated[int, typer.Option(help="in pixels")] = 1024,
) -> None:
    """Count every rank of every layout, print the largest."""
    quieten_libraries()
    config = HIDREAM_I1_CONFIG
    shapes = checkpoint_shapes(config)
    divisions = ModelDivisions(config["num_attention_heads"], config["num_routed_experts"])
    sample = Sample(height=height // VAE_SCALE_FACTOR, width=width // VAE_SCALE_FACTOR)
    alone = rank_costs(config, shapes, Layout(), 0, sample, NUM_SAMPLES, DTYPE)
    layouts: list[dict[str, Value]] = []
    for num_devices in (int(part) for part in devices.split(",")):
        layout = plan_layout(num_devices, divisions)
        say(f"{num_devices} devices: {layout}")
        ranks = [
            rank_costs(config, shapes, layout, rank, sample, NUM_SAMPLES, DTYPE)
            for rank in range(layout.world_size)
        ]
        flops = max(costs.flops for costs in ranks)
        held = max(costs.weight_bytes_held for costs in ranks)
        read = max(costs.weight_bytes_read for costs in ranks)
        layouts.append(
            {
                "num_devices": num_devices,
                "layout": str(layout),
                "weights_held_ratio": round(held / alone.weight_bytes_held, 4),
                "weights_read_ratio": round(read / alone.weight_bytes_read, 4),
                "weights_goal": round(1 / num_devices + 0.05, 4),
                "flops_ratio": round(flops / alone.flops, 4),
                "weights_held_gigabytes": round(held / 1e9, 3),
                "weights_read_gigabytes": round(read / 1e9, 3),
                "step_tflop": round(flops / 1e12, 3),
                "step_gigabytes_sent": round(max(costs.bytes_sent for costs in ranks) / 1e9, 3),
            }
        )
    report("layouts", layouts=layouts, width=width, height=height, num_samples=NUM_SAMPLES, dtype="bfloat16")


if __name__ == "__main__":
    typer.run(main)
