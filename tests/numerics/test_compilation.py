"""What is compiled at boot: used by the steps that it was named for, and nothing is compiled on a request."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.numerics.compiled_ranks import OF_OTHER_PROMPTS, OF_THE_NAMED_SHAPE, CompiledRank, Step
from tests.support.checkpoints import write_reshaped

NUM_BLOCKS = 2
RELATIVE_TOLERANCE = 1e-5

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler on a CPU"
)

# The first runs the blocks' graphs as they are; the service's own makes C++ of them for most of a minute.
WAYS_TO_COMPILE = [
    ("eager", "sp=2", "bfloat16"),
    *(pytest.param(("eager", "tp=2", weights), marks=pytest.mark.long) for weights in ("bfloat16", "int8")),
    *(
        pytest.param(("inductor", layout, weights), marks=[pytest.mark.long, needs_compiler])
        for layout, weights in (("sp=2,tp=2", "bfloat16"), ("tp=1", "int8"), ("tp=1", "float8"))
    ),
]


@pytest.fixture(scope="module", params=WAYS_TO_COMPILE, ids=" ".join)
def compiled_ranks(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[CompiledRank]:
    """Every rank of a layout whose blocks have collectives inside."""
    backend, layout, weights = request.param
    folder = tmp_path_factory.mktemp("compiled")
    # Blocks of one kind only: the compiler takes half a second for each kernel.
    checkpoint = write_reshaped(
        tiny_checkpoint,
        folder / "checkpoint",
        num_layers=NUM_BLOCKS,
        num_single_layers=0,
        llama_layers=[2] * NUM_BLOCKS,
    )
    compiler = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    subprocess.run(
        [sys.executable, "-m", "tests.numerics.compiled_ranks", checkpoint, layout, folder, backend, weights],
        env=os.environ | compiler,
        check=True,
    )
    ranks = []
    for path in folder.glob("[0-9]*.json"):
        answer = json.loads(path.read_text())
        steps = {name: Step(**step) for name, step in answer.pop("steps").items()}
        ranks.append(CompiledRank(**answer, steps=steps))
    return ranks


def test_a_rank_compiles_without_a_group_and_without_the_other_ranks(
    compiled_ranks: list[CompiledRank],
) -> None:
    assert not any(rank.had_group for rank in compiled_ranks)
    assert all(rank.num_compiled > 0 for rank in compiled_ranks)


def test_steps_of_a_named_shape_run_compiled_code_and_give_what_they_give_without(
    compiled_ranks: list[CompiledRank],
) -> None:
    for rank in compiled_ranks:
        for name in OF_THE_NAMED_SHAPE:
            step = rank.steps[name]
            # All that ran compiled at boot, in every block: nothing of it is left out.
            assert step.num_compiled_calls == rank.num_compiled_calls, name
            assert step.num_compiled_calls >= NUM_BLOCKS, name
            assert step.relative_difference < RELATIVE_TOLERANCE, name


def test_steps_of_another_shape_run_as_without_the_compiler(compiled_ranks: list[CompiledRank]) -> None:
    for rank in compiled_ranks:
        for name, step in rank.steps.items():
            if name not in OF_THE_NAMED_SHAPE + OF_OTHER_PROMPTS:
                assert (step.num_compiled_calls, step.relative_difference) == (0, 0.0), name


def test_steps_with_prompts_of_another_length_run_at_most_what_is_compiled_for_the_image_alone(
    compiled_ranks: list[CompiledRank],
) -> None:
    for rank in compiled_ranks:
        for name in OF_OTHER_PROMPTS:
            step = rank.steps[name]
            assert step.num_compiled_calls < rank.num_compiled_calls, name
            assert step.relative_difference < RELATIVE_TOLERANCE, name


def test_nothing_is_compiled_on_a_request(compiled_ranks: list[CompiledRank]) -> None:
    assert not any(step.num_compiled for rank in compiled_ranks for step in rank.steps.values())
