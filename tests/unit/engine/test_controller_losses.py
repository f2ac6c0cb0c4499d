"""What becomes of requests when ranks are lost, memory is short, or a request has a fault of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from hidream_grpc.engine.protocol.messages import (
    JobFault,
    StepPlan,
)
from hidream_grpc.engine.requests import (
    ImageFinished,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
)
from hidream_grpc.engine.step_limit import MIN_WAIT_STEPS
from hidream_grpc.errors import (
    JobInternalError,
    LossCause,
    NonFiniteError,
    OutOfDeviceMemoryError,
    RankDiedError,
    SnapshotError,
)
from tests.support.counting_ranks import ROUNDS_PER_IMAGE, CountingRanks, Service


def lost_in(
    ranks: CountingRanks, breaks: Callable[[StepPlan], bool], cause: LossCause, times: int = 1
) -> None:
    """Lose the group in the first plans that break it."""
    left = [RankDiedError((0,), "gone", cause)] * times

    def on_plan(plan: StepPlan) -> None:
        if left and breaks(plan):
            raise left.pop()

    ranks.on_plan = on_plan


def has_step_of(*claim_ids: str) -> Callable[[StepPlan], bool]:
    return lambda plan: set(claim_ids) <= set(plan.step_claims)


def out_of_memory(*claim_ids: str) -> tuple[JobFault, ...]:
    return tuple(
        JobFault(claim_id=claim_id, kind=OutOfDeviceMemoryError.__name__, error_id="e")
        for claim_id in claim_ids
    )


async def test_an_image_that_was_lost_with_its_rank_is_decoded_again() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    losses = [RankDiedError((0,), "killed by SIGKILL")]

    def die_in_the_second_round_of_the_second_image(_plan: StepPlan) -> None:
        at_second = ranks.images.get(0) and ranks.images[0][0].image_index == 1
        if losses and at_second and ranks.images[0][1] == ROUNDS_PER_IMAGE - 1:
            raise losses.pop()

    ranks.on_plan = die_in_the_second_round_of_the_second_image
    service.submit("survives", num_inference_steps=2, num_images=2)
    await service.run_until_ended("survives")
    assert service.claims_with(RequestRestarted) == ["survives"]
    images = [event.image_index for _, event in service.events if isinstance(event, ImageFinished)]
    assert images == [0, 1]
    assert service.steps_of("survives") == [1, 2]


async def test_jobs_go_on_after_a_loss_from_what_a_survivor_knows() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    service.submit("a", num_inference_steps=3)
    lost_in(ranks, lambda plan: len(ranks.plans) == 3, LossCause.OUTSIDE)
    await service.run_until_ended("a")
    (again,) = (a for plan in ranks.plans[1:] for a in plan.admissions)
    assert again.snapshot == b"a after 2"
    # Ranks of a new generation hold nothing that they could release.
    assert ranks.plans[3].releases == ()
    assert service.steps_of("a") == [1, 2, 3]
    assert [e for _, e in service.events if isinstance(e, RequestRestarted)] == [
        RequestRestarted(2, "rank 0: gone", 2)
    ]


async def test_without_a_survivor_jobs_go_on_from_what_was_handed_up_or_their_seed() -> None:
    ranks = CountingRanks(has_survivor=False)
    service = Service(ranks)
    service.submit("a", num_inference_steps=3)
    lost_in(ranks, lambda plan: len(ranks.plans) == 3, LossCause.OUTSIDE)
    await service.run_until_ended("a")
    (again,) = (a for plan in ranks.plans[1:] for a in plan.admissions)
    assert again.snapshot == b"handed up"
    # The snapshot of these ranks is always one of step 0.
    assert service.steps_of("a") == [1, 2, 1, 2, 3]
    assert service.controller.num_lost_steps == 2


async def test_while_suspects_run_alone_no_other_is_started() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=4)
    lost_in(ranks, has_step_of("a", "b"), LossCause.FAULT)
    ranks_on_plan = ranks.on_plan

    def submit_when_lost(plan: StepPlan) -> None:
        if len(ranks.plans) == 1:
            service.submit("newcomer", num_inference_steps=1)
        ranks_on_plan(plan)

    ranks.on_plan = submit_when_lost
    await service.run_until_ended("a", "b", "newcomer")
    stepped = [set(plan.step_claims) for plan in ranks.plans]
    assert stepped[:4] == [{"a", "b"}, {"a"}, {"b"}, {"a", "b", "newcomer"}]
    assert service.claims_with(RequestFailed) == []


async def test_a_job_that_is_lost_alone_again_fails_and_the_suspicion_ends() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("innocent", "culprit"):
        service.submit(claim_id, num_inference_steps=3)
    lost_in(ranks, has_step_of("culprit"), LossCause.FAULT, times=9)
    await service.run_until_ended("innocent", "culprit")
    assert isinstance(service.error_of("culprit"), JobInternalError)
    assert service.steps_of("innocent") == [1, 2, 3]


async def test_a_lowered_limit_rises_and_the_log_says_so_once_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=3 * MIN_WAIT_STEPS)
    lost_in(ranks, has_step_of("a", "b"), LossCause.OUT_OF_MEMORY)
    await service.run_until_ended("a", "b")
    rises = [message for message in caplog.messages if message.endswith("pixels again")]
    assert rises[:2] == [f"a step may hold {pixels} pixels again" for pixels in (5120, 6400)]
    # The fourth rise ends just below what did not fit.
    assert len(rises) == 4
    assert service.step_limit.pixels == 2 * 64 * 64 - 1


async def test_ranks_that_are_new_for_another_reason_may_hold_what_is_configured_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=3)
    losses = [
        RankDiedError((0,), "no memory for a step", LossCause.OUT_OF_MEMORY),
        RankDiedError((0,), "killed by SIGKILL", LossCause.OUTSIDE),
    ]

    def lose(plan: StepPlan) -> None:
        if losses and plan.step_claims:
            raise losses.pop(0)

    ranks.on_plan = lose
    await service.run_until_ended("a", "b")
    assert service.step_limit.pixels == 2**40
    assert caplog.messages.count(f"a step may hold {2**40} pixels again") == 1


async def test_a_lack_of_memory_lowers_what_a_step_may_hold() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=3)
    lost_in(ranks, has_step_of("a", "b"), LossCause.OUT_OF_MEMORY)
    await service.run_until_ended("a", "b")
    assert service.step_limit.pixels == 64 * 64
    assert [len(plan.step_claims) for plan in ranks.plans if plan.step_claims] == [2, 1, 1, 1, 1, 1, 1]
    assert service.claims_with(RequestFailed) == []


async def test_a_job_that_has_no_room_beside_others_is_tried_alone() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    def no_room_in_company(plan: StepPlan) -> tuple[JobFault, ...]:
        is_large_started = any(admission.claim_id == "large" for admission in plan.admissions)
        if is_large_started and len(plan.step_claims) > 1:
            return (JobFault(claim_id="large", kind=OutOfDeviceMemoryError.__name__, error_id=""),)
        return ()

    ranks.faults_of = no_room_in_company
    for claim_id in ("small", "large"):
        service.submit(claim_id, num_inference_steps=3)
    await service.run_until_ended("small", "large")
    assert service.claims_with(RequestFailed) == []
    assert [plan.step_claims for plan in ranks.plans][1] == ("large",)
    for claim_id in ("small", "large"):
        assert service.steps_of(claim_id) == [1, 2, 3]


async def test_a_job_that_runs_alone_gets_ranks_that_are_done_with_the_images_of_others() -> None:
    ranks = CountingRanks(world_size=3)
    service = Service(ranks)
    failed_plans: list[StepPlan] = []

    def no_room_while_three_decode(plan: StepPlan) -> tuple[JobFault, ...]:
        if failed_plans or len(ranks.images) < 3:
            return ()
        failed_plans.append(plan)
        return out_of_memory("alone first", "later")

    ranks.faults_of = no_room_while_three_decode
    service.submit("alone first", num_inference_steps=2)
    service.submit("later", num_inference_steps=1, num_images=2)
    await service.run_until_ended("alone first", "later")
    assert failed_plans
    assert sorted(service.claims_with(RequestFinished)) == ["alone first", "later"]


async def test_a_job_may_be_cancelled_while_another_that_had_no_room_is_started_again() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    async def snapshot_while_the_other_is_cancelled(claim_id: str, _step: int) -> None:
        service.controller.cancel("a" if claim_id == "b" else "b")

    ranks.snapshot_of = snapshot_while_the_other_is_cancelled  # type: ignore[assignment, method-assign]
    ranks.faults_of = lambda _plan: out_of_memory("a", "b") if len(ranks.plans) == 3 else ()
    service.submit("a", num_inference_steps=5)
    service.submit("b", num_inference_steps=5)
    service.submit("c", num_inference_steps=5)
    await service.run_until_ended("c")
    assert len(service.claims_with(RequestRestarted)) == 1


async def test_a_job_whose_snapshot_the_ranks_refuse_starts_from_its_seed() -> None:
    ranks = CountingRanks()
    ranks.faults_of = lambda plan: tuple(
        JobFault(claim_id=a.claim_id, kind=SnapshotError.__name__, error_id="", reason="of another dtype")
        for a in plan.admissions
        if a.snapshot
    )
    service = Service(ranks)
    for claim_id in ("resumed", "beside"):
        service.submit(claim_id, num_inference_steps=3)
    lost_in(ranks, lambda plan: len(ranks.plans) == 3, LossCause.OUTSIDE)
    await service.run_until_ended("resumed", "beside")
    assert service.claims_with(RequestFailed) == []
    restarts = [e.resumed_from_step for _, e in service.events if isinstance(e, RequestRestarted)]
    assert restarts == [2, 2, 0, 0]
    assert service.steps_of("resumed") == service.steps_of("beside") == [1, 2, 1, 2, 3]
    assert service.controller.num_lost_steps == 4


async def test_numbers_that_every_rank_finds_not_finite_fail_their_job_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = CountingRanks(world_size=2)
    ranks.faults_of = lambda plan: tuple(
        JobFault(claim_id=claim_id, kind=NonFiniteError.__name__, error_id="", reason="NaN (step 2)")
        for claim_id in plan.step_claims
        if claim_id == "bad" and len(ranks.plans) == 2
    )
    service = Service(ranks)
    for claim_id in ("bad", "good"):
        service.submit(claim_id, num_inference_steps=3)
    await service.run_until_ended("bad", "good")
    assert service.steps_of("bad") == [1]
    assert service.steps_of("good") == [1, 2, 3]
    error = service.error_of("bad")
    assert isinstance(error, JobInternalError)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "job failed: NaN (step 2)"
    assert (record.__dict__["job_id"], record.__dict__["error_id"]) == ("job of bad", error.error_id)
    assert error.error_id


async def test_a_job_that_has_no_room_alone_fails_for_want_of_memory() -> None:
    ranks = CountingRanks()
    ranks.faults_of = lambda plan: tuple(
        JobFault(claim_id=a.claim_id, kind=OutOfDeviceMemoryError.__name__, error_id="")
        for a in plan.admissions
        if a.claim_id == "large"
    )
    service = Service(ranks)
    for claim_id in ("small", "large"):
        service.submit(claim_id, num_inference_steps=3)
    await service.run_until_ended("small", "large")
    assert service.steps_of("small") == [1, 2, 3]
    error = service.error_of("large")
    assert isinstance(error, OutOfDeviceMemoryError)
    assert error.job_id == "job of large"
