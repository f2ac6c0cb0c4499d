"""The ranks' parent and their store are killed at every moment of a group's life; it comes back each time."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.errors import RankDiedError
from tests.support.faulty_ranks import children_of_zygote, send, until_busy
from tests.support.rank_groups import (
    admission,
    draw,
    group_config,
    picture,
    plan,
    store_pid_of,
    until,
    zygote_pid_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG_STEP = picture(width=256, height=256, num_images=6, num_inference_steps=20)
PROCESSES = pytest.mark.parametrize("process", ["zygote", "store"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_group() -> AsyncIterator[RankGroup]:
    group = RankGroup(group_config(2, timeouts=GroupTimeouts(load_seconds=120.0, init_seconds=1.0)))
    await group.start()
    yield group
    await group.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(shared_group: RankGroup) -> bytes:
    return await draw(shared_group, picture())


@pytest_asyncio.fixture(loop_scope="module")
async def group(shared_group: RankGroup, undisturbed: bytes) -> RankGroup:
    """A whole group of two ranks; each test leaves it whole."""
    return shared_group


def kill(group: RankGroup, process: str) -> None:
    pid = zygote_pid_of(group) if process == "zygote" else store_pid_of(group)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


async def comes_back(group: RankGroup, undisturbed: bytes) -> None:
    await group.wait_for_loss()
    # What is killed while the group comes back may be noticed when it is back.
    for _ in range(2):
        await group.recover()
        try:
            assert await draw(group, picture()) == undisturbed
        except RankDiedError:
            continue
        return
    raise AssertionError("the group was lost twice by one kill")


@PROCESSES
async def test_killed_in_a_step(group: RankGroup, undisturbed: bytes, process: str) -> None:
    await group.execute(plan(admissions=(admission("long", LONG_STEP),)))
    step = asyncio.create_task(group.execute(plan(step_claims=("long",))))
    await until_busy(group.rank_pids[0])
    kill(group, process)
    if process == "zygote":
        with pytest.raises(RankDiedError, match="zygote"):
            await step
    else:
        # No step needs the store.
        assert len(await step) == group.world_size
    await comes_back(group, undisturbed)


@PROCESSES
async def test_killed_while_a_rank_loads(group: RankGroup, undisturbed: bytes, process: str) -> None:
    known = children_of_zygote(group)
    send(group, signal.SIGKILL, 1)
    recovery = asyncio.create_task(comes_back(group, undisturbed))
    await until(lambda: bool(children_of_zygote(group) - known), "the replacement is started")
    kill(group, process)
    await recovery


@PROCESSES
async def test_killed_while_ranks_join(group: RankGroup, undisturbed: bytes, process: str) -> None:
    generation = group.generation
    send(group, signal.SIGKILL, 0)
    recovery = asyncio.create_task(comes_back(group, undisturbed))
    await until(lambda: group.generation > generation, "the new generation is joined")
    kill(group, process)
    await recovery


async def test_the_parent_is_killed_together_with_a_rank_and_the_store(
    group: RankGroup, undisturbed: bytes
) -> None:
    send(group, signal.SIGKILL, 0)
    kill(group, "store")
    kill(group, "zygote")
    await comes_back(group, undisturbed)
