"""Every layout generates the image of one device, on real gloo ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.numerics.rank_worlds import Case, RankResult, RankWorlds, Run
from tests.support.checkpoints import write_reshaped

# Without rounding that could flip a token's experts, final latents agree to this, relative.
FLOAT64_TOLERANCE = 1e-8
# One forward; over many steps a flipped expert may show.
FLOAT32_TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "4 heads, 4 experts": {"num_layers": 1, "num_single_layers": 2, "llama_layers": [0, 2, 2]},
    "6 heads, 6 experts": {
        "num_layers": 2,
        "llama_layers": [2, 0, 2],
        "num_attention_heads": 6,
        "num_routed_experts": 6,
        "num_activated_experts": 3,
    },
    "8 heads, 8 experts": {
        "num_attention_heads": 8,
        "attention_head_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "num_routed_experts": 8,
        "num_activated_experts": 3,
    },
    "5 heads, 4 experts": {"num_attention_heads": 5},
}


# One of each kind: an axis alone, axes together, a number of ranks that is no power of two.
LAYOUTS_OF_EACH_KIND = [
    ("4 heads, 4 experts", "tp=2"),
    ("4 heads, 4 experts", "cfg=2"),
    ("4 heads, 4 experts", "ep=2,sp=2,tp=2"),
    ("6 heads, 6 experts", "ep=3"),
    # No stream of tokens divides by 3.
    ("6 heads, 6 experts", "sp=3"),
]
OTHER_LAYOUTS = [
    ("4 heads, 4 experts", "ep=2"),
    ("4 heads, 4 experts", "dp=2"),
    ("4 heads, 4 experts", "cfg=2,ep=2,tp=2"),
    ("4 heads, 4 experts", "cfg=2,sp=2"),
    ("8 heads, 8 experts", "cfg=2,sp=4"),
    ("6 heads, 6 experts", "sp=6"),
    ("5 heads, 4 experts", "sp=5"),
    ("6 heads, 6 experts", "dp=3"),
    ("6 heads, 6 experts", "tp=2,ep=2"),
    ("5 heads, 4 experts", "tp=5"),
    ("4 heads, 4 experts", "tp=4"),
    ("4 heads, 4 experts", "tp=2,ep=2"),
    ("4 heads, 4 experts", "cfg=2,dp=2"),
    ("4 heads, 4 experts", "tp=4,ep=2"),
    ("6 heads, 6 experts", "tp=3"),
    ("8 heads, 8 experts", "tp=8"),
    ("8 heads, 8 experts", "ep=8"),
    ("8 heads, 8 experts", "cfg=2,dp=2,ep=2"),
]

_SQUARE = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 3, "seed": 7}
_WIDE = _SQUARE | {"width": 96, "prompt": "two blue squares", "seed": 8, "prompt_tokens": 192}
ONE_STEP = Case("one step", (_WIDE | {"guidance_scale": 4.0, "num_inference_steps": 1},))
# The third step has all of them, and the last step has one alone.
MIXED_BATCH = Case(
    "mixed batch",
    (
        _WIDE | {"guidance_scale": 4.0},
        _WIDE | {"guidance_scale": 0.0, "num_images": 3, "seed": 9, "num_inference_steps": 2},
        _WIDE | {"guidance_scale": 2.0, "negative_prompt": "red", "seed": 20, "num_inference_steps": 2},
    ),
)
CASES = (
    Case("guided square", (_SQUARE | {"guidance_scale": 4.0},)),
    Case("unguided square", (_SQUARE | {"guidance_scale": 0.0},)),
    ONE_STEP,
    MIXED_BATCH,
)
OTHER_CASES = (
    Case("guided wide", (_WIDE | {"guidance_scale": 4.0},)),
    Case("unguided wide", (_WIDE | {"guidance_scale": 0.0},)),
)

_GOOD = _SQUARE | {"guidance_scale": 4.0}
# The squares of such latents exceed 32 bits; it is the first to enter and the last to end.
_OVERFLOWS = _SQUARE | {"guidance_scale": 1e25, "num_inference_steps": 5}
ALONE, BESIDE_ONE_THAT_OVERFLOWS = Case("alone", (_GOOD,)), Case("beside", (_OVERFLOWS, _GOOD))

Generate = Callable[[str, str], dict[str, list[RankResult]]]
CheckpointOfShape = Callable[[str], Path]


@pytest.fixture(scope="module")
def rank_worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankWorlds]:
    worlds = RankWorlds(tmp_path_factory.mktemp("worlds"))
    yield worlds
    worlds.close()


@pytest.fixture(scope="module")
def checkpoint_of_shape(tiny_checkpoint: Path) -> CheckpointOfShape:
    """Folder of a checkpoint of one of `SHAPES`."""

    @cache
    def write(shape: str) -> Path:
        folder = tiny_checkpoint.parent / shape.replace(", ", "_")
        return write_reshaped(tiny_checkpoint, folder, **SHAPES[shape])

    return write


@pytest.fixture(scope="module")
def generate(is_long: bool, rank_worlds: RankWorlds, checkpoint_of_shape: CheckpointOfShape) -> Generate:
    """What each rank of a layout generates, by dtype or format of the weights; one world for all tests."""
    exact_cases = CASES + (OTHER_CASES if is_long else ())
    case = MIXED_BATCH if is_long else ONE_STEP

    @cache
    def generate(shape: str, layout: str) -> dict[str, list[RankResult]]:
        runs = {
            "float64": Run(exact_cases),
            "float32": Run((case, ALONE, BESIDE_ONE_THAT_OVERFLOWS), "float32"),
            "int8": Run((case,), weights="int8"),
        }
        results = rank_worlds.run(layout, checkpoint_of_shape(shape), [*runs.values()])
        return dict(zip(runs, results, strict=True))

    return generate


in_every_layout = pytest.mark.parametrize(
    ("shape", "layout"),
    [*LAYOUTS_OF_EACH_KIND, *(pytest.param(*layout, marks=pytest.mark.long) for layout in OTHER_LAYOUTS)],
)


def largest_error(result: RankResult, expected: RankResult) -> float:
    """Largest error of the final latents of all cases that the result has, relative to the largest value."""
    return max(
        relative_error(mine, other)
        for case in result.latents
        for mine, other in zip(result.latents[case], expected.latents[case], strict=True)
    )


def relative_error(mine: torch.Tensor, expected: torch.Tensor) -> float:
    return float((mine - expected).abs().max() / expected.abs().max())


@in_every_layout
def test_final_latents_are_those_of_one_device(shape: str, layout: str, generate: Generate) -> None:
    (alone,) = generate(shape, "tp=1")["float64"]
    for result in generate(shape, layout)["float64"]:
        assert result.latents.keys() == alone.latents.keys()
        assert largest_error(result, alone) <= FLOAT64_TOLERANCE


@in_every_layout
def test_final_latents_of_quantized_weights_are_those_of_one_device(
    shape: str, layout: str, generate: Generate
) -> None:
    (alone,) = generate(shape, "tp=1")["int8"]
    for result in generate(shape, layout)["int8"]:
        assert result.latents.keys() == alone.latents.keys()
        assert largest_error(result, alone) <= FLOAT64_TOLERANCE
    (exact,) = generate(shape, "tp=1")["float64"]
    assert largest_error(alone, exact) > FLOAT64_TOLERANCE


@in_every_layout
def test_in_float32_one_forward_is_that_of_one_device(shape: str, layout: str, generate: Generate) -> None:
    (alone,) = generate(shape, "tp=1")["float32"]
    for result in generate(shape, layout)["float32"]:
        cases = result.first_predictions.keys() - {BESIDE_ONE_THAT_OVERFLOWS.name}
        assert len(cases) == 2
        for case in cases:
            error = relative_error(result.first_predictions[case], alone.first_predictions[case])
            assert error <= FLOAT32_TOLERANCE


@in_every_layout
def test_all_ranks_hold_the_same_latents_bit_for_bit(shape: str, layout: str, generate: Generate) -> None:
    for first, *others in generate(shape, layout).values():
        for other in others:
            for case, latents in first.latents.items():
                for mine, its in zip(latents, other.latents[case], strict=True):
                    # Numbers that are none are the same numbers, too.
                    assert torch.equal(mine.nan_to_num(), its.nan_to_num())


@in_every_layout
def test_a_request_that_overflows_does_so_on_every_rank_and_spoils_no_other(
    shape: str, layout: str, generate: Generate
) -> None:
    for result in generate(shape, layout)["float32"]:
        overflown, beside = result.latents[BESIDE_ONE_THAT_OVERFLOWS.name]
        assert not overflown.isfinite().all()
        assert relative_error(beside, result.latents[ALONE.name][0]) <= FLOAT32_TOLERANCE


def test_no_collective_can_be_left_out(
    generate: Generate, rank_worlds: RankWorlds, checkpoint_of_shape: CheckpointOfShape
) -> None:
    shape, layout = "4 heads, 4 experts", "ep=2,sp=2,tp=2"
    (alone,) = generate(shape, "tp=1")["float64"]
    collectives = generate(shape, layout)["float64"][0].collectives
    assert len(collectives) == 13, collectives
    runs = [Run((ONE_STEP,), left_out=collective) for collective in collectives]
    for run, ranks in zip(runs, rank_worlds.run(layout, checkpoint_of_shape(shape), runs), strict=True):
        assert max(largest_error(result, alone) for result in ranks) > 1e-3, run.left_out
