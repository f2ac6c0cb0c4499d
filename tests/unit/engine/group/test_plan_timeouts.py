from __future__ import annotations

import itertools

import pytest

from hidream_grpc.engine.group.plan_timeouts import NUM_RECENT_PLANS, PlanTimeouts
from hidream_grpc.engine.protocol.messages import (
    Admission,
    Decode,
    DecodedImage,
    JobFault,
    PlanDone,
    StepPlan,
)
from hidream_grpc.model.parameters import GenerationParameters

MIN_SECONDS, UNKNOWN_SECONDS = 5.0, 600.0
_plan_ids = itertools.count(1)


@pytest.fixture
def limits() -> PlanTimeouts:
    """Timeouts in a generation whose first plan is done."""
    limits = PlanTimeouts(MIN_SECONDS, UNKNOWN_SECONDS)
    assert run(limits, plan(), 50.0) == UNKNOWN_SECONDS
    return limits


def plan(**content: object) -> StepPlan:
    return StepPlan(plan_id=next(_plan_ids), **content)  # type: ignore[arg-type]


def admit(claim_id: str, side: int = 64) -> Admission:
    parameters = GenerationParameters(
        prompt="a boat", width=side, height=side, num_inference_steps=9, guidance_scale=1.0, seed=1
    )
    return Admission(claim_id=claim_id, log_fields={}, parameters=parameters)


def run(limits: PlanTimeouts, to_run: StepPlan, seconds: float, **answer: object) -> float:
    """Run a plan that takes so many seconds; return its limit."""
    limit = limits.start(to_run)
    done = PlanDone(plan_id=to_run.plan_id, encode_seconds=0.0, step_seconds=0.0, **answer)  # type: ignore[arg-type]
    limits.done((done,), seconds)
    return limit


def test_the_limit_is_ten_times_the_longest_of_the_latest_plans_of_its_kind(limits: PlanTimeouts) -> None:
    run(limits, plan(admissions=(admit("a"),)), 1.0)
    assert run(limits, plan(step_claims=("a",)), 2.0) == UNKNOWN_SECONDS
    assert run(limits, plan(step_claims=("a",)), 1.0) == 20.0
    for _ in range(NUM_RECENT_PLANS - 2):
        assert run(limits, plan(step_claims=("a",)), 0.7) == 20.0
    # The longest plan is forgotten, the one after it not yet.
    run(limits, plan(step_claims=("a",)), 0.7)
    assert run(limits, plan(step_claims=("a",)), 0.7) == 10.0


def test_no_limit_is_too_short_for_a_busy_machine(limits: PlanTimeouts) -> None:
    run(limits, plan(), 0.001)
    assert run(limits, plan(), 0.001) == MIN_SECONDS


def test_other_work_has_limits_of_its_own(limits: PlanTimeouts) -> None:
    run(limits, plan(admissions=(admit("small"), admit("large", 256))), 1.0)
    run(limits, plan(step_claims=("small",)), 1.0)
    assert run(limits, plan(step_claims=("large",)), 1.0) == UNKNOWN_SECONDS
    assert run(limits, plan(step_claims=("small",), admissions=(admit("b"),)), 1.0) == UNKNOWN_SECONDS
    assert run(limits, plan(step_claims=("small",)), 1.0) == 10.0


def test_an_image_is_work_until_it_is_decoded(limits: PlanTimeouts) -> None:
    run(limits, plan(admissions=(admit("a"),)), 1.0)
    run(limits, plan(), 0.1)
    decode = Decode(claim_id="a", image_index=0, rank=0)
    run(limits, plan(decodes=(decode,)), 30.0)
    # It goes on in a plan that does not name it.
    assert run(limits, plan(), 30.0) == 300.0
    image = DecodedImage(claim_id="a", image_index=0, data=b"", decode_seconds=60.0)
    assert run(limits, plan(), 1.0, images=(image,)) == 300.0
    assert run(limits, plan(), 0.1) == MIN_SECONDS


@pytest.mark.parametrize("how", ["released", "failed", "group lost"])
def test_a_request_that_is_gone_is_no_work(limits: PlanTimeouts, how: str) -> None:
    run(limits, plan(), 0.1)
    run(limits, plan(admissions=(admit("a"),)), 1.0)
    run(limits, plan(decodes=(Decode(claim_id="a", image_index=0, rank=0),)), 30.0)
    if how == "released":
        run(limits, plan(releases=("a",)), 0.1)
    elif how == "failed":
        fault = JobFault(claim_id="a", kind="JobInternalError", error_id="1")
        run(limits, plan(), 30.0, faults=(fault,))
    else:
        limits.next_generation()
        run(limits, plan(), 0.1)
    assert run(limits, plan(), 0.1) == MIN_SECONDS


def test_the_first_plan_of_a_generation_may_warm_up_and_teaches_nothing(limits: PlanTimeouts) -> None:
    run(limits, plan(), 0.1)
    limits.next_generation()
    assert run(limits, plan(), 100.0) == UNKNOWN_SECONDS
    assert run(limits, plan(), 0.1) == MIN_SECONDS


def test_a_rank_that_is_to_join_may_end_the_longest_plan_first(limits: PlanTimeouts) -> None:
    assert limits.longest_seconds == UNKNOWN_SECONDS
    run(limits, plan(), 0.1)
    assert limits.longest_seconds == MIN_SECONDS
    run(limits, plan(admissions=(admit("a"),)), 3.0)
    assert limits.longest_seconds == 30.0
