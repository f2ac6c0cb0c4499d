"""A rank that hangs is noticed and replaced; one that is only slow is not."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.errors import LossCause, RankDiedError
from tests.support.faulty_ranks import LOOP, WAIT_FOR_EVER, children_of_zygote, faults, send, until_busy
from tests.support.rank_groups import (
    admission,
    draw,
    group_config,
    is_alive,
    picture,
    plan,
    store_pid_of,
    until,
    zygote_pid_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_RANKS = 3
LONG_STEP = picture(width=256, height=256, num_images=2, num_inference_steps=20)
MIN_PLAN_SECONDS = 2.0
TIMEOUTS = GroupTimeouts(load_seconds=240.0, init_seconds=1.0, min_plan_seconds=MIN_PLAN_SECONDS)
MARGIN_SECONDS = 3.0
NUM_BURNERS = 60
NOTICE_SECONDS = 100.0
"""Below the timeouts of load, join and collectives: what is noticed sooner, the watchdog noticed."""


@contextmanager
def no_file_descriptors() -> Iterator[None]:
    """This process can open nothing inside; what is open stays so."""
    lowest_free = os.dup(0)
    os.close(lowest_free)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_group(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RankGroup]:
    with faults(tmp_path_factory.mktemp("devices")):
        group = RankGroup(group_config(NUM_RANKS, timeouts=TIMEOUTS))
        await group.start()
        yield group
        await group.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(shared_group: RankGroup) -> bytes:
    """The picture that every test must get, whatever happened before."""
    return await draw(shared_group, picture())


@pytest_asyncio.fixture(loop_scope="module")
async def group(shared_group: RankGroup, undisturbed: bytes) -> RankGroup:
    """A whole group of three ranks; each test leaves it whole."""
    return shared_group


@pytest.mark.parametrize(
    ("victims", "fault"),
    [
        pytest.param((0,), LOOP, id="rank 0 loops"),
        pytest.param((2,), WAIT_FOR_EVER, id="the last rank waits", marks=pytest.mark.long),
        pytest.param((0, 1), LOOP, id="two loop", marks=pytest.mark.long),
    ],
)
async def test_a_rank_that_hangs_in_a_step_is_replaced_and_those_that_wait_for_it_are_not(
    group: RankGroup, undisturbed: bytes, victims: tuple[int, ...], fault: signal.Signals
) -> None:
    step = await in_a_learnt_step(group)
    await until_busy(group.rank_pids[victims[0]])
    send(group, fault, *victims)
    await is_noticed(step, LossCause.FAULT, "hung", victims)
    await comes_back(group, undisturbed, victims)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(LOOP, id="a loop", marks=pytest.mark.long), pytest.param(WAIT_FOR_EVER, id="a wait")],
)
async def test_a_rank_that_hangs_while_idle_is_noticed_by_the_next_plan(
    group: RankGroup, undisturbed: bytes, fault: signal.Signals
) -> None:
    await learn(group)
    send(group, fault, 1)
    step = asyncio.create_task(group.execute(plan(step_claims=("long",))))
    await is_noticed(step, LossCause.FAULT, "hung", (1,))
    await comes_back(group, undisturbed, (1,))


async def test_a_stopped_rank_is_noticed_while_idle(group: RankGroup, undisturbed: bytes) -> None:
    send(group, signal.SIGSTOP, 1)
    async with asyncio.timeout(NOTICE_SECONDS):
        loss = await group.wait_for_loss()
    assert (loss.ranks, loss.cause) == ((1,), LossCause.OUTSIDE)
    assert "stopped" in loss.reason
    await comes_back(group, undisturbed, (1,))


async def test_ranks_work_while_the_server_is_out_of_file_descriptors_and_a_stopped_one_is_noticed_after(
    group: RankGroup, undisturbed: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with no_file_descriptors():
        assert await draw(group, picture()) == undisturbed
        send(group, signal.SIGSTOP, 1)
        await until(lambda: "cannot look for stopped processes" in caplog.text, "a look failed")
    async with asyncio.timeout(NOTICE_SECONDS):
        loss = await group.wait_for_loss()
    assert (loss.ranks, loss.cause) == ((1,), LossCause.OUTSIDE)
    assert caplog.text.count("cannot look for stopped processes") == 1
    await comes_back(group, undisturbed, (1,))


@pytest.mark.parametrize("victims", [(0,), (0, 2)], ids=["rank 0", "two at once"])
async def test_a_stopped_rank_is_noticed_in_a_step_whose_time_is_not_known(
    group: RankGroup, undisturbed: bytes, victims: tuple[int, ...]
) -> None:
    await group.execute(plan(admissions=(admission("long", LONG_STEP),)))
    step = asyncio.create_task(group.execute(plan(step_claims=("long",))))
    await until_busy(group.rank_pids[0])
    send(group, signal.SIGSTOP, *victims)
    await is_noticed(step, LossCause.OUTSIDE, "stopped", victims)
    await comes_back(group, undisturbed, victims)


async def test_a_rank_that_is_stopped_while_it_loads_is_started_again(
    group: RankGroup, undisturbed: bytes
) -> None:
    known = children_of_zygote(group)
    send(group, signal.SIGKILL, 0)
    recovery = asyncio.create_task(comes_back(group, undisturbed, (0,)))
    await until(lambda: bool(children_of_zygote(group) - known), "the replacement is started")
    (loading,) = children_of_zygote(group) - known
    os.kill(loading, signal.SIGSTOP)
    async with asyncio.timeout(NOTICE_SECONDS):
        await recovery
    assert not is_alive(loading)


async def test_a_rank_that_is_stopped_while_it_joins_is_replaced_too(
    group: RankGroup, undisturbed: bytes
) -> None:
    generation = group.generation
    send(group, signal.SIGKILL, 0)
    recovery = asyncio.create_task(comes_back(group, undisturbed, (0, 2)))
    await until(lambda: group.generation > generation, "the new generation is joined")
    send(group, signal.SIGSTOP, 2)
    async with asyncio.timeout(NOTICE_SECONDS):
        await recovery


@pytest.mark.parametrize("process", ["zygote", "store"])
async def test_the_ranks_parent_and_their_store_are_replaced_when_they_are_stopped(
    group: RankGroup, undisturbed: bytes, process: str
) -> None:
    pid = zygote_pid_of(group) if process == "zygote" else store_pid_of(group)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(NOTICE_SECONDS):
        loss = await group.wait_for_loss()
    assert loss.cause is LossCause.OUTSIDE
    assert "stopped" in loss.reason
    await comes_back(group, undisturbed, tuple(range(NUM_RANKS)) if process == "zygote" else ())


@pytest.mark.long
async def test_a_rank_that_hardly_gets_a_core_is_waited_for() -> None:
    # A group of its own: it learns how slow a step may be.
    group = RankGroup(group_config(2, timeouts=TIMEOUTS))
    await group.start()
    try:
        undisturbed = await draw(group, picture())
        pids, generation = group.rank_pids, group.generation
        limit_seconds = max(MIN_PLAN_SECONDS, 10 * await learn(group))
        with starved(pids[1]):
            step = asyncio.create_task(group.execute(plan(step_claims=("long",))))
            # A rank that did nothing, or looped, would be killed by then.
            done, _ = await asyncio.wait((step,), timeout=limit_seconds + MARGIN_SECONDS)
            assert not done
        assert len(await step) == group.world_size
        await group.execute(plan(releases=("long",)))
        assert (group.rank_pids, group.generation) == (pids, generation)
        assert await draw(group, picture()) == undisturbed
    finally:
        await group.stop()


@contextmanager
def starved(pid: int) -> Iterator[None]:
    """Leave a process next to nothing of one core."""
    cores = os.sched_getaffinity(0)
    burners = [
        # Where the kernel divides a core among sessions first, each has the share of the rank's own one.
        subprocess.Popen(("sh", "-c", "while :; do :; done"), start_new_session=True)
        for _ in range(NUM_BURNERS)
    ]
    try:
        for burner in burners:
            os.sched_setaffinity(burner.pid, {min(cores)})
        for thread in threads_of(pid):
            os.sched_setaffinity(thread, {min(cores)})
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        for thread in threads_of(pid):
            os.sched_setaffinity(thread, cores)


def threads_of(pid: int) -> list[int]:
    return [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]


async def learn(group: RankGroup) -> float:
    """Have the group know how long a long step takes; returns that, in seconds."""
    await group.execute(plan(admissions=(admission("long", LONG_STEP),)))
    step_seconds = []
    for _ in range(2):
        started = time.monotonic()
        await group.execute(plan(step_claims=("long",)))
        step_seconds.append(time.monotonic() - started)
    return max(step_seconds)


async def in_a_learnt_step(group: RankGroup) -> asyncio.Task[object]:
    await learn(group)
    return asyncio.create_task(group.execute(plan(step_claims=("long",))))


async def is_noticed(
    step: asyncio.Task[object], cause: LossCause, word: str, victims: tuple[int, ...]
) -> None:
    async with asyncio.timeout(NOTICE_SECONDS):
        with pytest.raises(RankDiedError, match=word) as lost:
            await step
    assert lost.value.cause is cause
    assert lost.value.ranks
    assert set(lost.value.ranks) <= set(victims)


async def comes_back(group: RankGroup, undisturbed: bytes, replaced: tuple[int, ...]) -> None:
    """See that exactly these ranks are replaced, and that the group draws what it drew before."""
    pids = group.rank_pids
    await group.wait_for_loss()
    assert await group.recover() == replaced
    kept = {rank for rank in range(NUM_RANKS) if group.rank_pids[rank] == pids[rank]}
    assert kept == set(range(NUM_RANKS)) - set(replaced)
    assert await draw(group, picture()) == undisturbed
