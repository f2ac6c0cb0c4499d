"""A job that breaks the rank group fails, alone; nobody who was beside it does."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hidream_grpc.engine.group.config import GroupConfig, GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import PlanDone, StepPlan
from hidream_grpc.engine.requests import RequestFailed, RequestFinished, RequestRestarted
from hidream_grpc.errors import JobInternalError, OutOfDeviceMemoryError
from tests.support.rank_engine import RankEngine, running_engine
from tests.support.rank_groups import group_config, little_memory, no_memory_kept, picture

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_STEPS = 6
MANY_SAMPLES = picture(width=256, height=256, num_images=24, num_inference_steps=2)


class PoisonedGroup(RankGroup):
    """Ranks of which one crashes, or has no memory, in every step of a job whose name says so."""

    def __init__(self, config: GroupConfig) -> None:
        super().__init__(config)
        self.plans: list[StepPlan] = []

    async def execute(self, plan: StepPlan) -> tuple[PlanDone, ...]:
        self.plans.append(plan)
        if any(claim_id.startswith("crashes") for claim_id in plan.step_claims):
            os.kill(self.rank_pids[1], signal.SIGSEGV)
        if any(claim_id.startswith("fills") for claim_id in plan.step_claims):
            with little_memory(self.rank_pids[1]):
                return await super().execute(plan)
        return await super().execute(plan)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> PoisonedGroup:
    return PoisonedGroup(group_config(2, timeouts=GroupTimeouts(load_seconds=120.0, init_seconds=1.0)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(group: PoisonedGroup) -> AsyncIterator[RankEngine]:
    with no_memory_kept():
        async with running_engine(group) as engine:
            yield engine


def error_of(engine: RankEngine, job_id: str) -> Exception:
    (failed,) = engine.events(job_id, RequestFailed)
    return failed.error


async def test_a_job_that_crashes_a_rank_twice_fails_and_the_next_one_is_drawn(engine: RankEngine) -> None:
    engine.submit("crashes alone", picture())
    await engine.ended("crashes alone")
    assert isinstance(error_of(engine, "crashes alone"), JobInternalError)
    assert len(engine.events("crashes alone", RequestRestarted)) == 1
    assert len(await engine.draw("after the crash", picture())) == 1


async def test_of_a_batch_only_the_job_that_crashes_its_ranks_fails(
    engine: RankEngine, group: PoisonedGroup
) -> None:
    request = picture(num_inference_steps=NUM_STEPS)
    innocent = ("beside it", "beside it too")
    for job_id in (innocent[0], "crashes in company", innocent[1]):
        engine.submit(job_id, request)
    await engine.ended(*innocent, "crashes in company")
    assert isinstance(error_of(engine, "crashes in company"), JobInternalError)
    for job_id in innocent:
        assert len(engine.images(job_id)) == 1
        assert engine.steps(job_id) == list(range(1, NUM_STEPS + 1))
    # Once in company, once alone.
    crashes = [plan.step_claims for plan in group.plans if "crashes in company" in plan.step_claims]
    assert [len(step_claims) for step_claims in crashes] == [3, 1]
    # The suspicion ends: they share their steps again.
    assert set(innocent) in [set(plan.step_claims) for plan in group.plans]


async def test_a_job_that_does_not_fit_alone_fails_for_want_of_memory_and_the_limit_is_lowered(
    engine: RankEngine, group: PoisonedGroup
) -> None:
    pids, limit = group.rank_pids, engine.step_limit.pixels
    engine.submit("fills the memory", MANY_SAMPLES)
    await engine.ended("fills the memory")
    assert isinstance(error_of(engine, "fills the memory"), OutOfDeviceMemoryError)
    assert engine.step_limit.pixels == 256 * 256 * MANY_SAMPLES.num_samples // 2 < limit
    # No process was lost.
    assert group.rank_pids == pids
    assert len(await engine.draw("after the lack of memory", picture())) == 1


async def test_a_job_is_innocent_of_kills_from_outside_even_where_it_is_a_suspect(
    engine: RankEngine, group: PoisonedGroup
) -> None:
    engine.submit("crashes with a bystander", picture(num_inference_steps=NUM_STEPS))
    kills = 0

    def kill_when_suspected(event: object) -> None:
        nonlocal kills
        if isinstance(event, RequestRestarted) and kills < 3:
            kills += 1
            os.kill(group.rank_pids[0], signal.SIGKILL)

    engine.submit("bystander", picture(num_inference_steps=NUM_STEPS), kill_when_suspected)
    await engine.ended("crashes with a bystander", "bystander")
    assert kills == 3
    assert engine.events("bystander", RequestFinished)
    assert isinstance(error_of(engine, "crashes with a bystander"), JobInternalError)
