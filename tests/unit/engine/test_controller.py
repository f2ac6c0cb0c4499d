"""Rounds: steps, images decoded beside them, and requests that come and leave."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from hidream_grpc.engine.protocol.messages import (
    Decode,
    StepPlan,
)
from hidream_grpc.engine.requests import (
    ImageFinished,
    PromptReport,
    RequestFinished,
    StepFinished,
)
from hidream_grpc.engine.step_limit import MIN_WAIT_STEPS
from hidream_grpc.model.parameters import SampleSize
from tests.support.counting_ranks import ROUNDS_PER_IMAGE, STEP_SECONDS, CountingRanks, Service


async def test_others_take_a_step_in_every_round_of_an_image() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    service.submit("decodes", num_inference_steps=1, width=128, height=128)
    service.submit("steps", num_inference_steps=20)
    await service.run_until_ended("decodes", "steps")
    started = next(number for number, plan in enumerate(ranks.plans) if plan.decodes)
    assert all(plan.step_claims == ("steps",) for plan in ranks.plans[started : started + ROUNDS_PER_IMAGE])
    kinds = [(claim_id, type(event)) for claim_id, event in service.events]
    between = kinds[kinds.index(("decodes", StepFinished)) : kinds.index(("decodes", ImageFinished))]
    assert between.count(("steps", StepFinished)) >= ROUNDS_PER_IMAGE


async def test_an_image_is_finished_where_no_request_takes_a_step_any_more() -> None:
    ranks = CountingRanks(world_size=2)
    service = Service(ranks)
    service.submit("alone", num_inference_steps=1, num_images=3)
    await service.run_until_ended("alone")
    images = [event.image_index for _, event in service.events if isinstance(event, ImageFinished)]
    assert images == [0, 1, 2]
    assert sum(bool(plan.decodes) for plan in ranks.plans) == 2


async def test_a_round_may_decode_for_one_step_time_of_those_that_step_in_it() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    service.submit("large", num_inference_steps=2, width=128, height=128)
    service.submit("small", num_inference_steps=9)
    await service.run_until_ended("large", "small")
    small, large = STEP_SECONDS[64], STEP_SECONDS[128]
    budgets = [(plan.step_claims, plan.decode_budget_seconds) for plan in ranks.plans]
    assert budgets[:4] == [
        (("large",), None),
        # Its own time is not known yet.
        (("small",), large),
        (("large",), large),
        (("small",), small),
    ]
    assert set(budgets[4:]) == {(("small",), small), ((), small)}


async def test_a_cancelled_request_frees_the_rank_that_decodes_its_image() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    def cancel_in_the_second_round(_plan: StepPlan) -> None:
        if ranks.images.get(0, (None, 0))[1] == ROUNDS_PER_IMAGE - 1:
            service.controller.cancel("leaves")

    ranks.on_plan = cancel_in_the_second_round
    service.submit("leaves", num_inference_steps=1)
    service.submit("waits", num_inference_steps=1)
    await service.run_until_ended("waits")
    assert service.claims_with(ImageFinished) == ["waits"]
    released = next(plan for plan in ranks.plans if plan.releases)
    assert released.releases == ("leaves",)
    assert released.decodes == (Decode(claim_id="waits", image_index=0, rank=0),)


async def test_a_stale_claim_that_is_cancelled_leaves_a_newer_claim_of_its_job_alone() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    def cancel_the_older_once_both_step(plan: StepPlan) -> None:
        if set(plan.step_claims) == {"job/1", "job/2"}:
            service.controller.cancel("job/1")

    ranks.on_plan = cancel_the_older_once_both_step
    service.submit("job/1", num_inference_steps=3, job_id="job")
    service.submit("job/2", num_inference_steps=3, job_id="job")
    await service.run_until_ended("job/2")
    assert service.steps_of("job/2") == [1, 2, 3]
    assert service.claims_with(RequestFinished) == ["job/2"]
    assert ("job/1",) in [plan.releases for plan in ranks.plans]


async def test_prompts_are_counted_once_for_a_plan_and_not_for_every_rank() -> None:
    service = Service(CountingRanks(world_size=3))
    for claim_id in ("first", "second"):
        service.submit(claim_id, num_inference_steps=2)
    await service.run_until_ended("first", "second")
    assert service.prompts == [PromptReport(num_cache_hits=2, num_cache_misses=4)]


@pytest.mark.parametrize(
    "waiting_sizes, factor", [((), 1.0), ([SampleSize(64, 64)], 1.25)], ids=["alone", "waited for"]
)
async def test_a_lowered_limit_of_a_step_rises_while_others_wait_for_room(
    waiting_sizes: Collection[SampleSize], factor: float
) -> None:
    service = Service(CountingRanks())
    service.waiting_sizes = waiting_sizes
    service.step_limit.run_out(2 * 64 * 64)
    service.submit("runs", num_inference_steps=MIN_WAIT_STEPS)
    await service.run_until_ended("runs")
    assert service.step_limit.pixels == factor * 64 * 64
