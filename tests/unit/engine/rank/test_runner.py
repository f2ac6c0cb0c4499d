"""The answer of a rank when the numbers of a request are NaN or infinite."""

from __future__ import annotations

import pytest

from hidream_grpc.devices.device import open_device
from hidream_grpc.engine.protocol.messages import Decode, JobFault, PlanDone, StepPlan
from hidream_grpc.engine.rank.runner import Runner
from hidream_grpc.errors import NonFiniteError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.pipeline import HiDreamModel
from tests.support.rank_groups import admission, picture, plan

# Far beyond what callers may request: float32 cannot hold the squares of such latents.
OVERFLOWING_GUIDANCE = 1e25


@pytest.fixture(scope="module")
def runner() -> Runner:
    """The runner of a rank that has the whole demo model."""
    device = open_device("cpu", 0)
    model = HiDreamModel.from_pretrained(demo_checkpoint_path(), None, device)
    return Runner(model, device, ParallelGroups(Layout()).world, ImageMetadata())


def run_to_the_end(runner: Runner, plans: list[StepPlan]) -> list[PlanDone]:
    answers = [runner.run(plan) for plan in plans]
    runner.run(plan(releases=("bad", "good")))
    return answers


def fault(reason: str) -> JobFault:
    return JobFault(claim_id="bad", kind=NonFiniteError.__name__, error_id="", reason=reason)


def test_latents_that_overflow_are_at_fault_in_their_step_and_nothing_is_made_of_them(
    runner: Runner,
) -> None:
    bad = picture(guidance_scale=OVERFLOWING_GUIDANCE, seed=6, with_previews=True)
    good = picture(with_previews=True)
    both = ("bad", "good")
    admissions = (admission("bad", bad), admission("good", good))
    first, second = run_to_the_end(
        runner,
        [
            plan(admissions=admissions, step_claims=both, snapshot_claim="bad"),
            plan(step_claims=both, snapshot_claim="bad"),
        ],
    )
    assert first.faults == ()
    assert first.snapshot is not None
    assert [preview.claim_id for preview in first.previews] == ["bad", "good"]
    assert second.faults == (fault("its latents are not finite (step 2 of 3, seed 6)"),)
    assert second.snapshot is None
    assert [preview.claim_id for preview in second.previews] == ["good"]


def test_pixels_that_overflow_are_at_fault_though_their_latents_are_finite(runner: Runner) -> None:
    bad = picture(guidance_scale=OVERFLOWING_GUIDANCE, seed=6, num_inference_steps=1)
    stepped, decoded = run_to_the_end(
        runner,
        [
            plan(admissions=(admission("bad", bad),), step_claims=("bad",)),
            plan(decodes=(Decode(claim_id="bad", image_index=0, rank=0),)),
        ],
    )
    assert stepped.faults == ()
    assert decoded.images == ()
    assert decoded.faults == (
        fault("the pixels that the autoencoder gives are not finite (step 1 of 1, seed 6)"),
    )
