"""Prompts on a group of ranks: encoded once, and again when a rank was replaced that had them not."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import PlanDone
from hidream_grpc.model.parameters import GenerationParameters
from tests.support.rank_groups import admission, draw, group_config, picture, plan

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_RANKS = 2


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> AsyncIterator[RankGroup]:
    group = RankGroup(group_config(NUM_RANKS))
    await group.start()
    yield group
    await group.stop()


async def start(group: RankGroup, *requests: GenerationParameters) -> tuple[int, int]:
    """Start requests in one plan, and forget them; hits and misses, which every rank must count alike."""
    jobs = {f"job {number}": request for number, request in enumerate(requests)}
    answers: tuple[PlanDone, ...] = await group.execute(
        plan(admissions=tuple(admission(job_id, request) for job_id, request in jobs.items()))
    )
    await group.execute(plan(releases=tuple(jobs)))
    assert not any(answer.faults for answer in answers)
    ((hits, misses),) = {(answer.num_prompt_cache_hits, answer.num_prompt_cache_misses) for answer in answers}
    return hits, misses


async def test_a_prompt_used_twice_is_encoded_once(group: RankGroup) -> None:
    one, other = picture(prompt="a green ring"), picture(prompt="a green ring", negative_prompt="a red ring")
    assert await start(group, one) == (0, 1)
    assert await start(group, one) == (1, 0)
    assert await start(group, other) == (1, 1)
    assert await start(group, one, other) == (3, 0)


async def test_requests_that_start_together_share_a_prompt(group: RankGroup) -> None:
    requests = [picture(prompt="a yellow square", seed=seed) for seed in range(4)]
    assert await start(group, *requests) == (3, 1)


@pytest.mark.parametrize("victim", range(NUM_RANKS))
async def test_a_replaced_rank_gets_the_prompts_that_the_others_have(group: RankGroup, victim: int) -> None:
    request = picture(prompt=f"a blue star for rank {victim}")
    undisturbed = await draw(group, request)
    assert await start(group, request) == (1, 0)
    os.kill(group.rank_pids[victim], signal.SIGKILL)
    await group.wait_for_loss()
    assert await group.recover() == (victim,)
    assert await start(group, request) == (0, 1)
    assert await start(group, request) == (1, 0)
    assert await draw(group, request) == undisturbed
