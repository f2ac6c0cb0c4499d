"""What a rank's real modules hold, compute, send and keep in memory in one step, with memory or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.rows import divide_rows, gather_rows
from hidream_grpc.model.transformer.model import HiDreamTransformer, RankRows
from scripts.bench.counting import (
    CountingAxis,
    MetaDevice,
    count_bytes_sent,
    counted_flops,
    counted_peak_bytes,
)
from scripts.bench.forwards import condition, exact_transformer, random_inputs


@dataclass(frozen=True, slots=True)
class RankCosts:
    """What one step costs one rank.

    Attributes:
        flops: multiply-adds count as two.
        weight_bytes: of the transformer, on the device.
        bytes_sent: in all collectives of the step.
        activation_bytes: of the tensors that were alive together, at most.
    """

    flops: int
    weight_bytes: int
    bytes_sent: int
    activation_bytes: int


def costs_without_memory(
    config: Mapping[str, Any],
    layout: Layout,
    rank: int,
    sample: Sample,
    num_rows: int,
    dtype: torch.dtype,
) -> RankCosts:
    """Count what one rank does, without memory and without other ranks."""
    groups = ParallelGroups(layout, rank)
    axes = count_bytes_sent(groups)
    device = MetaDevice(dtype, config["num_routed_experts"])
    transformer = exact_transformer(config, device, groups)
    return step_costs(transformer, groups, axes, config, sample, num_rows)


def step_costs(
    transformer: HiDreamTransformer,
    groups: ParallelGroups,
    axes: Sequence[CountingAxis],
    config: Mapping[str, Any],
    sample: Sample,
    num_rows: int,
) -> RankCosts:
    """Count what a rank does in one step; all ranks of its axes must call it, where there are others."""
    weight = transformer.x_embedder.proj.weight
    rows = divide_rows(num_rows, groups)
    inputs = random_inputs(config, sample, len(rows.own), weight.device, weight.dtype)
    rank_rows = RankRows(
        latents=inputs.latents,
        time_and_prompt=torch.randn(
            len(rows.model), weight.shape[0], device=weight.device, dtype=weight.dtype
        ),
        conditioning=condition(transformer, inputs),
        unpadded_samples=rows.unpadded_samples,
    )
    before = sum(axis.bytes_sent for axis in axes)

    def step() -> Tensor:
        velocity: Tensor = transformer(rank_rows)
        return gather_rows(velocity[: rows.num_unpadded], num_rows, groups)

    flops = counted_flops(step)
    bytes_sent = sum(axis.bytes_sent for axis in axes) - before
    return RankCosts(
        flops=flops,
        weight_bytes=sum(parameter.nbytes for parameter in transformer.parameters()),
        bytes_sent=bytes_sent,
        activation_bytes=counted_peak_bytes(lambda: transformer(rank_rows)),
    )
