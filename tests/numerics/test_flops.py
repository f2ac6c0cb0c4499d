"""The formulas that `docs/performance.md` rests on say what torch's counter says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel

from hidream_grpc.devices.device import open_device
from hidream_grpc.model.checkpoint.files import TransformerConfig
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from scripts.bench.counting import counted_flops
from scripts.bench.flops import (
    HIDREAM_I1_CONFIG,
    VAE_SCALE_FACTOR,
    exact_forward_flops,
    library_forward_flops,
    prompt_flops,
    timestep_flops,
)
from scripts.bench.forwards import (
    condition,
    exact_transformer,
    fill_at_random,
    library_forward,
    library_transformer,
    random_inputs,
    rank_rows,
)

CPU = torch.device("cpu")
BATCH_SIZE = 2
COMMON = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 6,
    "text_emb_dim": 20,
    "max_resolution": (16, 16),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "two of four experts": COMMON
    | {
        "num_layers": 2,
        "num_single_layers": 1,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "axes_dims_rope": (8, 4, 4),
        "caption_channels": [24, 40],
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "llama_layers": [0, 2, 2],
    },
    "three of six experts": COMMON
    | {
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 5,
        "attention_head_dim": 24,
        "axes_dims_rope": (4, 10, 10),
        "caption_channels": [56, 32],
        "num_routed_experts": 6,
        "num_activated_experts": 3,
        "llama_layers": [0, 1, 1, 0],
    },
    "no experts": COMMON
    | {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "axes_dims_rope": (2, 2, 4),
        "caption_channels": [16, 24],
        "num_routed_experts": 0,
        "num_activated_experts": 0,
        "llama_layers": [1, 0],
    },
}
ROUTED_CONFIGS = {name: config for name, config in CONFIGS.items() if config["num_routed_experts"]}
SAMPLES = {
    "square": Sample(height=12, width=12, num_t5_tokens=7, num_llama_tokens=5),
    "non-square": Sample(height=12, width=8, num_t5_tokens=7, num_llama_tokens=5),
    "non-square without padding": Sample(height=32, width=8, num_t5_tokens=4, num_llama_tokens=9),
}


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_the_library_formula_is_what_torch_counts(config: dict[str, Any], sample: Sample) -> None:
    inputs = random_inputs(config, sample, BATCH_SIZE, CPU, torch.float32)
    transformer = fill_at_random(library_transformer(config, torch.float32), CPU)
    counted = counted_flops(lambda: library_forward(transformer, inputs))
    assert counted == BATCH_SIZE * library_forward_flops(TransformerConfig(**config), sample)


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
@pytest.mark.parametrize("config", ROUTED_CONFIGS.values(), ids=ROUTED_CONFIGS)
@torch.inference_mode()
def test_our_formulas_are_what_torch_counts(config: dict[str, Any], sample: Sample) -> None:
    described = TransformerConfig(**config)
    inputs = random_inputs(config, sample, BATCH_SIZE, CPU, torch.float32)
    transformer = exact_transformer(config, open_device("cpu", 0), ParallelGroups(Layout()))
    fill_at_random(transformer, CPU)
    conditioning = condition(transformer, inputs)
    of_prompts = counted_flops(lambda: condition(transformer, inputs))
    assert of_prompts == BATCH_SIZE * prompt_flops(described, sample)
    of_schedules = counted_flops(lambda: rank_rows(transformer, inputs, conditioning))
    assert of_schedules == BATCH_SIZE * timestep_flops(described)
    rows = rank_rows(transformer, inputs, conditioning)
    assert counted_flops(lambda: transformer(rows)) == BATCH_SIZE * exact_forward_flops(described, sample)


def test_the_real_dimensions_are_those_of_the_real_model() -> None:
    with torch.device("meta"):
        transformer = HiDreamImageTransformer2DModel(**HIDREAM_I1_CONFIG)
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert round(num_parameters / 1e9, 2) == 17.11


@pytest.mark.parametrize(
    ("width", "height", "most"),
    [(512, 512, 0.93), (1024, 768, 0.73), (768, 1024, 0.73), (1024, 1024, 0.98)],
)
def test_the_exact_forward_of_the_real_model_saves_what_is_promised(
    width: int, height: int, most: float
) -> None:
    sample = Sample(height=height // VAE_SCALE_FACTOR, width=width // VAE_SCALE_FACTOR)
    ratio = exact_forward_flops(HIDREAM_I1.transformer, sample) / library_forward_flops(
        HIDREAM_I1.transformer, sample
    )
    assert ratio <= most


def test_the_caption_projections_of_a_prompt_cost_less_than_one_step() -> None:
    sample = Sample(height=64, width=64)
    assert prompt_flops(HIDREAM_I1.transformer, sample) < 0.01 * exact_forward_flops(
        HIDREAM_I1.transformer, sample
    )
