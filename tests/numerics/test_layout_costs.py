"""What `scripts/bench/layouts.py` counts without memory is what real ranks compute, hold, read and send."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import ModelDivisions, parse_layout, plan_layout
from scripts.bench.flops import HIDREAM_I1_CONFIG
from scripts.bench.forwards import fill_at_random, library_transformer
from scripts.bench.layouts import RankCosts, checkpoint_shapes, rank_costs
from tests.numerics.counted_ranks import NUM_SAMPLES, SAMPLE

LAYOUTS = ["tp=2,ep=2", "cfg=2,sp=2"]
OTHER_LAYOUTS = ["tp=2", "ep=2", "tp=4", "cfg=2,tp=2", "sp=2,tp=2"]
TIMEOUT_SECONDS = 240
CONFIG: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "caption_channels": [24, 40],
    "text_emb_dim": 20,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": [8, 4, 4],
    "max_resolution": [16, 16],
    "llama_layers": [0, 2, 2],
}


@pytest.fixture(scope="module")
def real_costs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[RankCosts]]:
    """Run the ranks of each layout, and return their costs."""
    layouts = LAYOUTS + (OTHER_LAYOUTS if request.config.getoption("--long") else [])
    folder = tmp_path_factory.mktemp("costs")
    checkpoint = folder / "transformer"
    library = fill_at_random(library_transformer(CONFIG, torch.float32), torch.device("cpu"))
    library.save_pretrained(checkpoint)
    answers = folder / "answers"
    answers.mkdir()
    command = [sys.executable, "-m", "tests.numerics.counted_ranks", str(checkpoint), str(answers), *layouts]
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS)
    return {
        layout: [
            RankCosts(**json.loads((answers / layout / f"{rank}.json").read_text()))
            for rank in range(parse_layout(layout).world_size)
        ]
        for layout in layouts
    }


@pytest.mark.parametrize(
    "layout_text", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.long) for layout in OTHER_LAYOUTS)]
)
@torch.inference_mode()
def test_costs_counted_without_memory_are_those_of_real_ranks(
    layout_text: str, real_costs: dict[str, list[RankCosts]]
) -> None:
    layout = parse_layout(layout_text)
    shapes = checkpoint_shapes(CONFIG)
    counted = [
        rank_costs(CONFIG, shapes, layout, rank, SAMPLE, NUM_SAMPLES, torch.float32)
        for rank in range(layout.world_size)
    ]
    for of_rank, really in zip(counted, real_costs[layout_text], strict=True):
        assert of_rank.weight_bytes_held == really.weight_bytes_held
        assert of_rank.weight_bytes_read == really.weight_bytes_read
        assert of_rank.bytes_sent == really.bytes_sent
        if layout.expert_parallel == 1:
            assert of_rank.flops == really.flops
    # Which rank of the expert axis computes a token is the gate's decision.
    assert sum(costs.flops for costs in counted) == sum(costs.flops for costs in real_costs[layout_text])


@pytest.mark.parametrize(
    "num_devices", [*(pytest.param(few, marks=pytest.mark.long) for few in (1, 2, 4)), 8]
)
@torch.inference_mode()
def test_no_rank_of_the_real_model_holds_or_reads_more_than_its_share(num_devices: int) -> None:
    shapes = checkpoint_shapes(HIDREAM_I1_CONFIG)
    weight_bytes = 2 * sum(shape.numel() for shape in shapes.values())
    layout = plan_layout(num_devices, ModelDivisions(num_attention_heads=20, num_routed_experts=4))
    costs = rank_costs(HIDREAM_I1_CONFIG, shapes, layout, 0, Sample(height=64, width=64), 2, torch.bfloat16)
    # The first rank's shares are the largest.
    most = (1 / num_devices + 0.05) * weight_bytes
    assert costs.weight_bytes_held <= most
    assert costs.weight_bytes_read <= most


@pytest.mark.parametrize(
    ("layout", "tensor_parallel_layout"), [("cfg=2,sp=2", "tp=4"), ("cfg=2,sp=4", "tp=4,ep=2")]
)
@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 96)], ids=["square", "padded"])
@torch.inference_mode()
def test_sequence_parallel_divides_all_operations_and_sends_a_fifth_of_what_tensor_parallel_does(
    layout: str, tensor_parallel_layout: str, height: int, width: int
) -> None:
    # The real model's dimensions; its 48 blocks cost what a few cost, many times.
    config = {**HIDREAM_I1_CONFIG, "num_layers": 1, "num_single_layers": 2, "llama_layers": [0, 1, 1]}
    shapes = checkpoint_shapes(config)
    sample = Sample(height=height, width=width)
    alone, sequence_parallel, tensor_parallel = (
        rank_costs(config, shapes, parse_layout(text), 0, sample, 2, torch.bfloat16)
        for text in ("tp=1", layout, tensor_parallel_layout)
    )
    assert sequence_parallel.bytes_sent <= 0.2 * tensor_parallel.bytes_sent
    # The first rank has most tokens: one more of each stream that does not divide.
    assert sequence_parallel.flops <= 1.002 * alone.flops / parse_layout(layout).world_size


@torch.inference_mode()
def test_one_rank_of_the_real_model_holds_all_of_it() -> None:
    shapes = checkpoint_shapes(HIDREAM_I1_CONFIG)
    costs = rank_costs(HIDREAM_I1_CONFIG, shapes, Layout(), 0, Sample(height=64, width=64), 1, torch.bfloat16)
    weight_bytes = 2 * sum(shape.numel() for shape in shapes.values())
    assert costs.weight_bytes_held == costs.weight_bytes_read == weight_bytes
    assert costs.bytes_sent == 0
