"""On real ranks a prompt is encoded once, by the ranks that hold the encoders, and all have the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.pipeline import HiDreamModel
from tests.numerics.prompt_ranks import BROKEN, CIRCLE, PROMPTS, SQUARE, STAR, Planned, Seen

# float32: a projection of fewer columns may sum in another order.
TOLERANCE = 1e-5

LAYOUTS = {
    "cfg=2": Layout(cfg_parallel=2),
    "ep=2,tp=2": Layout(expert_parallel=2, tensor_parallel=2),
}
OTHER_LAYOUTS = {"tp=2": Layout(tensor_parallel=2)}

Stages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks_of(
    is_long: bool, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Stages]:
    """What each rank of each layout saw at each stage."""
    folder = tmp_path_factory.mktemp("ranks")
    all_layouts = LAYOUTS | (OTHER_LAYOUTS if is_long else {})
    layouts = json.dumps([asdict(layout) for layout in all_layouts.values()])
    done = subprocess.run(
        [sys.executable, "-m", "tests.numerics.prompt_ranks", str(tiny_checkpoint), str(folder), layouts],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: [
            torch.load(folder / str(index) / f"{rank}.pt", weights_only=False)
            for rank in range(layout.world_size)
        ]
        for index, (name, layout) in enumerate(all_layouts.items())
    }


@pytest.fixture(params=[*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in OTHER_LAYOUTS)])
def ranks(request: pytest.FixtureRequest, ranks_of: dict[str, Stages]) -> Stages:
    return ranks_of[request.param]


def seen(ranks: Stages, stage: str) -> list[Seen]:
    return [rank[stage] for rank in ranks]


def counts(ranks: Stages, stage: str) -> set[tuple[int, int]]:
    """Hits and misses, as every rank counts them."""
    return {(s.num_cache_hits, s.num_cache_misses) for s in seen(ranks, stage)}


def runs(ranks: Stages, stage: str) -> list[tuple[str, PaddedPrompt]]:
    """Encoders that ran on any rank, with their prompts."""
    return sorted(run for s in seen(ranks, stage) for run in s.runs)


def once(*prompts: PaddedPrompt) -> list[tuple[str, PaddedPrompt]]:
    return sorted((encoder, p) for encoder in ("CLIP-L", "CLIP-G", "T5", "Llama") for p in prompts)


def assert_same_everywhere(ranks: Stages, stage: str) -> None:
    first, *others = seen(ranks, stage)
    for other in others:
        assert other.conditionings.keys() == first.conditionings.keys()
        for prompt, tensors in first.conditionings.items():
            assert all(map(torch.equal, tensors, other.conditionings[prompt]))


def test_every_rank_has_the_conditioning_that_one_process_has(ranks: Stages, tiny_checkpoint: Path) -> None:
    alone = HiDreamModel.from_pretrained(tiny_checkpoint, None, CpuDevice()).encode(PROMPTS).conditionings
    assert_same_everywhere(ranks, "first")
    for prompt, tensors in seen(ranks, "first")[0].conditionings.items():
        expected = alone[prompt].pooled, alone[prompt].t5, alone[prompt].llama
        for tensor, its_expected in zip(tensors, expected, strict=True):
            torch.testing.assert_close(tensor, its_expected, rtol=0, atol=TOLERANCE)


def test_each_encoder_runs_once_for_a_prompt_on_one_of_the_ranks(ranks: Stages) -> None:
    assert runs(ranks, "first") == once(*set(PROMPTS))
    assert counts(ranks, "first") == {(1, 2)}
    encoders = [{encoder for encoder, _ in s.runs} for s in seen(ranks, "first")]
    assert sum(map(len, encoders)) == 4
    assert all(encoders), "with so few ranks each has an encoder"


def test_prompts_that_all_ranks_have_are_not_encoded_again(ranks: Stages) -> None:
    assert runs(ranks, "again") == []
    assert counts(ranks, "again") == {(3, 0)}
    assert_same_everywhere(ranks, "again")


def test_a_prompt_that_one_encoder_fails_for_is_missing_everywhere_and_the_next_is_there(
    ranks: Stages,
) -> None:
    for s in seen(ranks, "broken"):
        assert list(s.conditionings) == [STAR]
    errors = [s.errors for s in seen(ranks, "broken")]
    assert max(errors) == (BROKEN,)
    assert sum(map(len, errors)) == 1, "the rank with T5 alone"
    assert_same_everywhere(ranks, "broken")


def test_an_encoder_that_fails_on_one_rank_fails_only_the_jobs_with_that_prompt(ranks: Stages) -> None:
    planned: list[Planned] = [rank["planned"] for rank in ranks]
    assert [p.steps for p in planned] == [{"whole": 1}] * len(ranks)
    assert max(p.faults for p in planned) == (
        ("broken", "JobInternalError"),
        ("half broken", "JobInternalError"),
    )
    assert sum(len(p.faults) for p in planned) == 2, "the rank with T5 alone reports them"
    # The square twice and the star are cached; the empty prompt does not count.
    assert {(p.num_prompt_cache_hits, p.num_prompt_cache_misses) for p in planned} == {(3, 2)}


def test_a_new_rank_without_a_cache_agrees_with_the_survivors(ranks: Stages) -> None:
    assert counts(ranks, "after a replacement") == {(0, 2)}
    assert runs(ranks, "after a replacement") == once(CIRCLE, SQUARE)
    assert_same_everywhere(ranks, "after a replacement")
    for prompt, tensors in seen(ranks, "after a replacement")[0].conditionings.items():
        before = seen(ranks, "first")[0].conditionings[prompt]
        assert all(map(torch.equal, tensors, before))
    assert counts(ranks, "after it again") == {(2, 0)}
    assert runs(ranks, "after it again") == []
