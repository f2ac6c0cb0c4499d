"""What the planner counts of a layout without torch is what real ranks hold, compute, send and keep."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
import torch

from hidream_grpc.devices.device_types import CUDA
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.costs.activations import decode_bytes, step_bytes
from hidream_grpc.model.costs.model import ModelCosts
from hidream_grpc.model.costs.ranks import RankPlace
from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.costs.steps import step_costs as planned_step_costs
from hidream_grpc.model.costs.weights import transformer_bytes
from hidream_grpc.model.decoding.vae import decode_in_slices
from hidream_grpc.model.parallel.experts import RoutedExperts
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from scripts.bench.counting import counted_peak_bytes
from scripts.bench.flops import HIDREAM_I1_CONFIG
from scripts.bench.forwards import fill_at_random, library_transformer
from tests.numerics.counted_ranks import NUM_ROWS, SAMPLE
from tests.numerics.rank_costs import RankCosts, costs_without_memory
from tests.numerics.test_shares import transformer_of

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
OTHER_CONFIG = CONFIG | {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 6,
    "attention_head_dim": 24,
    "axes_dims_rope": [4, 10, 10],
    "num_routed_experts": 6,
    "num_activated_experts": 3,
}
WIDE = Sample(height=12, width=8, num_t5_tokens=7, num_llama_tokens=5)


def planned(
    config: dict[str, Any], layout_text: str, rank: int, sample: Sample, num_rows: int, dtype: torch.dtype
) -> tuple[int, int, int]:
    """Bytes of weights, operations and bytes sent."""
    layout, described = parse_layout(layout_text), msgspec.convert(config, TransformerConfig)
    step = planned_step_costs(described, layout, rank, sample, num_rows, dtype.itemsize)
    place = RankPlace.of(layout, rank)
    held = transformer_bytes(described, place, WeightFormat.BFLOAT16, dtype.itemsize)
    return held, step.flops, step.bytes_sent


@pytest.fixture(scope="module")
def real_costs(is_long: bool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[RankCosts]]:
    """Run the ranks of each layout, and return their costs."""
    layouts = LAYOUTS + (OTHER_LAYOUTS if is_long else [])
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
def test_planned_costs_are_those_of_real_ranks(
    layout_text: str, real_costs: dict[str, list[RankCosts]]
) -> None:
    plans = [
        planned(CONFIG, layout_text, rank, SAMPLE, NUM_ROWS, torch.float32)
        for rank in range(parse_layout(layout_text).world_size)
    ]
    for (held, flops, sent), really in zip(plans, real_costs[layout_text], strict=True):
        assert held == really.weight_bytes
        assert sent == really.bytes_sent
        if "ep" not in layout_text:
            assert flops == really.flops
    # Which rank of the expert axis computes a token is the gate's decision.
    assert sum(flops for _, flops, _ in plans) == sum(costs.flops for costs in real_costs[layout_text])


# Each expert gets equally many tokens, so the rows of a rank's experts are a multiple of their number.
# Numbers of 2 and of 4 bytes, each in layouts of every axis.
@pytest.mark.parametrize(
    ("config", "layout_text", "sample", "num_rows", "dtype"),
    [
        pytest.param(
            *case,
            dtype,
            id=f"{case[1]}-{dtype}".replace("torch.", ""),
            marks=[] if dtype is usual_dtype else pytest.mark.long,
        )
        for case, usual_dtype in (
            ((CONFIG, "tp=1", WIDE, 4), torch.bfloat16),
            ((CONFIG, "ep=4", SAMPLE, 6), None),
            ((CONFIG, "cfg=2,dp=2", SAMPLE, 6), torch.bfloat16),
            ((CONFIG, "cfg=2,tp=4,ep=2", WIDE, 4), torch.float32),
            ((OTHER_CONFIG, "tp=3,ep=2", SAMPLE, 4), torch.bfloat16),
            ((OTHER_CONFIG, "tp=6", WIDE, 2), None),
            ((OTHER_CONFIG, "sp=3,tp=2", SAMPLE, 2), torch.float32),
            ((CONFIG, "ep=2,sp=4", WIDE, 8), torch.bfloat16),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ],
)
@torch.inference_mode()
def test_planned_costs_are_those_of_the_modules_of_any_rank(
    config: dict[str, Any], layout_text: str, sample: Sample, num_rows: int, dtype: torch.dtype
) -> None:
    layout = parse_layout(layout_text)
    num_ranks = layout.world_size
    # The first rank of each axis has the largest share, the last one the smallest.
    for rank in {0, num_ranks // 2, num_ranks - 1}:
        counted = costs_without_memory(config, layout, rank, sample, num_rows, dtype)
        expected = counted.weight_bytes, counted.flops, counted.bytes_sent
        assert planned(config, layout_text, rank, sample, num_rows, dtype) == expected, rank


@pytest.mark.parametrize(
    ("layout_text", "num_rows", "width"),
    [
        ("tp=1", 1, 128),
        pytest.param("tp=1", 4, 96, marks=pytest.mark.long),
        pytest.param("tp=4", 2, 128, marks=pytest.mark.long),
        pytest.param("tp=20", 1, 128, marks=pytest.mark.long),
        ("tp=4,ep=2", 2, 128),
        pytest.param("cfg=2,sp=2", 2, 128, marks=pytest.mark.long),
        ("cfg=2,sp=4", 2, 96),
    ],
)
@torch.inference_mode()
def test_no_tensors_of_a_step_of_the_real_model_take_more_than_is_planned(
    layout_text: str, num_rows: int, width: int
) -> None:
    # Each block ends with what it began with, so a few of each kind have the peak of all.
    config = {**HIDREAM_I1_CONFIG} | {"num_layers": 1, "num_single_layers": 2, "llama_layers": [0, 1, 2]}
    layout, sample = parse_layout(layout_text), Sample(height=128, width=width)
    counted = costs_without_memory(config, layout, 0, sample, num_rows, torch.bfloat16)
    place = RankPlace.of(layout, 0)
    least = step_bytes(msgspec.convert(config, TransformerConfig), place, sample, num_rows, 2)
    assert counted.activation_bytes <= least <= 1.1 * counted.activation_bytes


@pytest.mark.parametrize(
    ("width", "height"), [(1360, 768), (512, 512), pytest.param(1024, 1024, marks=pytest.mark.long)]
)
@torch.inference_mode()
def test_no_tensors_of_the_real_decoder_take_more_than_is_planned(width: int, height: int) -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**msgspec.to_builtins(HIDREAM_I1.vae)).bfloat16()
        latents = torch.empty(1, 16, height // 8, width // 8).bfloat16()

    def decode() -> None:
        for _ in decode_in_slices(vae, latents):
            pass

    counted = counted_peak_bytes(decode)
    assert counted <= decode_bytes(HIDREAM_I1.vae, width, height, 2) <= 1.1 * counted


def test_one_rank_holds_all_of_the_real_model_and_no_other_more_than_its_share() -> None:
    config = HIDREAM_I1.transformer
    whole = transformer_bytes(config, RankPlace.of(parse_layout("tp=1"), 0), WeightFormat.BFLOAT16, 2)
    assert round(whole / 1e9, 2) == 34.21
    for layout_text in ("tp=2", "tp=4", "tp=4,ep=2"):
        layout = parse_layout(layout_text)
        for rank in range(layout.world_size):
            held = transformer_bytes(config, RankPlace.of(layout, rank), WeightFormat.BFLOAT16, 2)
            assert held <= (1 / layout.world_size + 0.05) * whole


@pytest.mark.parametrize(
    ("layout_text", "tensor_parallel_layout"), [("cfg=2,sp=2", "tp=4"), ("cfg=2,sp=4", "tp=4,ep=2")]
)
@pytest.mark.parametrize("width", [128, 96], ids=["square", "padded"])
def test_sequence_parallel_divides_all_operations_and_sends_a_fifth_of_what_tensor_parallel_does(
    layout_text: str, tensor_parallel_layout: str, width: int
) -> None:
    config, sample = HIDREAM_I1.transformer, Sample(height=128, width=width)
    alone, sequence_parallel, tensor_parallel = (
        planned_step_costs(config, parse_layout(text), 0, sample, 2, 2)
        for text in ("tp=1", layout_text, tensor_parallel_layout)
    )
    assert sequence_parallel.bytes_sent <= 0.2 * tensor_parallel.bytes_sent
    # The first rank has most tokens: one more of each stream that does not divide.
    assert sequence_parallel.flops <= 1.002 * alone.flops / parse_layout(layout_text).world_size


@pytest.mark.parametrize("layout", ["tp=1", "tp=2", "ep=4", "tp=4,ep=2"])
def test_the_experts_that_are_dequantized_at_a_time_have_room(layout: str) -> None:
    blocks = {"num_layers": 1, "num_single_layers": 1, "llama_layers": (0, 1)}
    config = msgspec.structs.replace(HIDREAM_I1.transformer, **blocks)
    formats = WeightFormats(transformer=WeightFormat.INT8)
    needed = [
        # A kernel for all groups takes the matrices of all, while those of the product before are cached.
        2 * (part.gate_and_up.weight.numel() + part.down.weight.numel())
        for part in transformer_of(config, layout, 0).modules()
        if isinstance(part, RoutedExperts)
    ]
    work = [
        ModelCosts(HIDREAM_I1, CUDA, each).work_bytes(parse_layout(layout), StepShape(512, 512, 1))
        for each in (formats, WeightFormats())
    ]
    assert max(needed) > 10**7
    assert work[0].runtime_bytes - work[1].runtime_bytes >= max(needed)
