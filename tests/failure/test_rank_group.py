from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from hidream_grpc.devices.device_types import StartMethod
from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import Decode
from hidream_grpc.errors import RankDiedError, StartupError
from hidream_grpc.logs import LogConfig
from tests.support.rank_groups import (
    admission,
    decode,
    draw,
    group_config,
    is_alive,
    little_memory,
    no_memory_kept,
    picture,
    plan,
    store_pid_of,
    until,
    zygote_pid_of,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_RANKS = 3
LONG_STEP = picture(width=256, height=256, num_images=4)
# More than the 64 MiB that glibc may grow in without asking for more.
MANY_SAMPLES = picture(width=384, height=384, num_images=16)
HUGE_LATENTS = picture(width=2048, height=2048, num_images=64)


@pytest.fixture(scope="module")
def log_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "ranks.log"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_group(log_file: Path) -> AsyncIterator[RankGroup]:
    config = group_config(
        NUM_RANKS,
        timeouts=GroupTimeouts(load_seconds=120.0, init_seconds=1.0, join_seconds=30.0),
        log=LogConfig(level="INFO", format="json", file=log_file),
    )
    with no_memory_kept():
        group = RankGroup(config)
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
    ("victims", "in_a_step"),
    [
        pytest.param((0,), True, id="rank 0 in a step"),
        pytest.param((2,), False, id="the last rank while idle"),
        pytest.param((0, 1), True, id="two at once in a step"),
        *(
            pytest.param(victims, in_a_step, marks=pytest.mark.long)
            for victims, in_a_step in (((0,), False), ((2,), True), ((0, 1), False))
        ),
    ],
)
async def test_killed_ranks_are_replaced_and_the_picture_is_the_same(
    group: RankGroup, undisturbed: bytes, victims: tuple[int, ...], in_a_step: bool
) -> None:
    pids, num_restarts = group.rank_pids, group.num_restarts
    if in_a_step:
        await group.execute(plan(admissions=(admission("long", LONG_STEP),)))
        step = asyncio.create_task(group.execute(plan(step_claims=("long",))))
        await until_busy(pids[victims[0]])
        kill(group, *victims)
        with pytest.raises(RankDiedError, match="SIGKILL") as lost:
            await step
    else:
        kill(group, *victims)
        lost_idle = await group.wait_for_loss()
        with pytest.raises(RankDiedError, match="SIGKILL") as lost:
            await group.execute(plan(step_claims=("long",)))
        assert set(lost_idle.ranks) <= set(victims)
    assert lost.value.ranks
    assert set(lost.value.ranks) <= set(victims)

    assert await group.recover() == victims

    survivors = set(range(NUM_RANKS)) - set(victims)
    assert {rank for rank in range(NUM_RANKS) if group.rank_pids[rank] == pids[rank]} == survivors
    assert group.num_restarts == num_restarts + len(victims)
    assert await draw(group, picture()) == undisturbed


async def test_a_rank_that_dies_while_it_loads_is_started_again(group: RankGroup, undisturbed: bytes) -> None:
    survivors = group.rank_pids[1:]
    known = children_of_zygote(group)
    kill(group, 0)
    recovery = asyncio.create_task(group.recover())
    await until(lambda: bool(children_of_zygote(group) - known), "the replacement is started")
    for loading in children_of_zygote(group) - known:
        os.kill(loading, signal.SIGKILL)
    assert await recovery == (0,)
    assert group.rank_pids[1:] == survivors
    assert await draw(group, picture()) == undisturbed


async def test_a_rank_that_dies_while_the_others_join_is_replaced_too(
    group: RankGroup, undisturbed: bytes
) -> None:
    survivor, generation = group.rank_pids[2], group.generation
    kill(group, 0)
    os.kill(group.rank_pids[1], signal.SIGSTOP)
    recovery = asyncio.create_task(group.recover())
    await until(lambda: group.generation > generation, "the new generation is joined")
    kill(group, 1)
    assert await recovery == (0, 1)
    assert group.rank_pids[2] == survivor
    assert await draw(group, picture()) == undisturbed


async def test_a_survivor_that_does_not_come_back_in_time_is_replaced_too(
    group: RankGroup, undisturbed: bytes
) -> None:
    survivor = group.rank_pids[2]
    os.kill(group.rank_pids[1], signal.SIGSTOP)
    kill(group, 0)
    assert await group.recover() == (0, 1)
    assert group.rank_pids[2] == survivor
    assert await draw(group, picture()) == undisturbed


async def test_the_store_is_replaced_and_every_rank_kept(group: RankGroup, undisturbed: bytes) -> None:
    pids, store_pid = group.rank_pids, store_pid_of(group)
    os.kill(store_pid, signal.SIGKILL)
    assert (await group.wait_for_loss()).ranks == ()
    assert await group.recover() == ()
    assert group.rank_pids == pids
    assert store_pid_of(group) != store_pid
    assert await draw(group, picture()) == undisturbed


async def test_all_start_again_when_their_zygote_dies(group: RankGroup, undisturbed: bytes) -> None:
    before = (zygote_pid_of(group), store_pid_of(group), *group.rank_pids)
    os.kill(zygote_pid_of(group), signal.SIGKILL)
    assert (await group.wait_for_loss()).ranks == tuple(range(NUM_RANKS))
    assert await group.recover() == tuple(range(NUM_RANKS))
    assert not any(is_alive(pid) for pid in before)
    assert await draw(group, picture()) == undisturbed


@pytest.mark.long
async def test_new_generations_cost_no_file_descriptors(group: RankGroup, undisturbed: bytes) -> None:
    """Neither the server nor a survivor keeps anything of the groups before."""
    num_open: list[tuple[int, int]] = []
    for _ in range(5):
        kill(group, 0)
        await group.wait_for_loss()
        await group.recover()
        await draw(group, picture())
        num_open.append((psutil.Process().num_fds(), psutil.Process(group.rank_pids[2]).num_fds()))
    (server_first, survivor_first), *_, (server_last, survivor_last) = num_open
    assert server_last <= server_first
    assert survivor_last <= survivor_first


async def test_a_job_that_does_not_fit_one_rank_fails_alone(
    group: RankGroup, undisturbed: bytes, log_file: Path
) -> None:
    pids, generation = group.rank_pids, group.generation
    with little_memory(pids[1]):
        admitted = await group.execute(
            plan(
                admissions=(admission("huge", HUGE_LATENTS), admission("small", picture())),
                step_claims=("huge", "small"),
            )
        )
    (fault,) = (fault for answer in admitted for fault in answer.faults)
    assert (fault.claim_id, fault.kind) == ("huge", "OutOfDeviceMemoryError")
    assert [len(answer.faults) for answer in admitted] == [0, 1, 0]
    for _ in range(2):
        await group.execute(plan(releases=("huge",), step_claims=("small",)))
    assert (await decode(group, "small", rank=1)).data == undisturbed
    await group.execute(plan(releases=("small",)))
    assert (group.rank_pids, group.generation) == (pids, generation)

    (line,) = (line for line in lines_of(log_file) if line.get("error_id") == fault.error_id)
    assert (line["rank"], line["generation"]) == (1, generation)
    assert (line["job_id"], line["request_id"]) == ("job of huge", "request of huge")
    assert "can't allocate memory" in line["exc_info"]


async def test_an_image_that_cannot_be_decoded_fails_its_job_alone(
    group: RankGroup, undisturbed: bytes
) -> None:
    await group.execute(plan(admissions=(admission("one image", picture()),)))
    answers = await group.execute(
        plan(decodes=(Decode(claim_id="one image", image_index=1, rank=2),), step_claims=("one image",))
    )
    assert [[fault.kind for fault in answer.faults] for answer in answers] == [[], [], ["JobInternalError"]]
    assert await draw(group, picture()) == undisturbed
    await group.execute(plan(releases=("one image",)))


async def test_a_forward_that_fails_on_one_rank_breaks_the_group_and_no_process(
    group: RankGroup, undisturbed: bytes
) -> None:
    pids = group.rank_pids
    await group.execute(plan(admissions=(admission("large", MANY_SAMPLES),)))
    with little_memory(pids[1], spare_bytes=2 * 1024 * 1024), pytest.raises(RankDiedError):
        await group.execute(plan(step_claims=("large",)))
    assert await group.recover() == ()
    assert group.rank_pids == pids
    assert await draw(group, picture()) == undisturbed


async def test_previews_come_from_one_rank_and_only_on_demand(group: RankGroup) -> None:
    jobs = (admission("quiet", picture()), admission("shown", picture(with_previews=True)))
    await group.execute(plan(admissions=jobs))
    answers = await group.execute(plan(step_claims=("quiet", "shown")))
    assert [[preview.claim_id for preview in answer.previews] for answer in answers] == [["shown"], [], []]
    assert answers[0].previews[0].data.startswith(b"\xff\xd8")
    assert all(answer.step_seconds > 0 for answer in answers)
    await group.execute(plan(releases=("quiet", "shown")))


async def test_ranks_ignore_what_a_terminal_sends_to_all(group: RankGroup, undisturbed: bytes) -> None:
    for pid in (zygote_pid_of(group), *group.rank_pids):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert await draw(group, picture()) == undisturbed


@pytest.mark.long
async def test_a_group_of_fresh_interpreters_draws_the_same_and_leaves_nothing(
    group: RankGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_sample_a_step = picture(guidance_scale=1.0)
    drawn_by_a_fork = await draw(group, one_sample_a_step)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fresh = RankGroup(group_config(1, start_method=StartMethod.EXEC))
    await fresh.start()
    try:
        assert await draw(fresh, one_sample_a_step) == drawn_by_a_fork
        pids = (zygote_pid_of(fresh), store_pid_of(fresh), *fresh.rank_pids)
    finally:
        await fresh.stop()
    assert not any(is_alive(pid) for pid in pids if pid is not None)
    assert entries_of(tmp_path) == []


async def test_all_ranks_are_replaced_where_survivors_cannot_join_again(
    group: RankGroup, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = group._processes
    monkeypatch.setattr(processes, "_config", replace(processes._config, replace="all"))
    pids = group.rank_pids
    kill(group, 1)
    await group.wait_for_loss()
    assert await group.recover() == (0, 1, 2)
    assert not set(pids) & set(group.rank_pids)
    assert not any(is_alive(pid) for pid in pids)
    assert await draw(group, picture()) == undisturbed


async def test_a_model_that_cannot_be_loaded_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    group = RankGroup(group_config(1, model_path=tmp_path, checkpoint_fingerprint=""))
    with pytest.raises(StartupError, match=r"^-m/--model-path: .+no such file$"):
        await group.start()
    assert set(psutil.Process().children(recursive=True)) <= before


async def test_no_process_outlives_a_killed_server() -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.busy_rank_group", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        pids = json.loads(await server.stdout.readline())
        assert len(pids) == 4
        assert all(is_alive(pid) for pid in pids)
    finally:
        server.kill()
    await until(lambda: not any(is_alive(pid) for pid in pids), "zygote, store and ranks are gone", 2.0)
    await server.communicate()


def kill(group: RankGroup, *ranks: int) -> None:
    for pid in [group.rank_pids[rank] for rank in ranks]:
        os.kill(pid, signal.SIGKILL)


def entries_of(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def lines_of(log_file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_file.read_text().splitlines()]


def children_of_zygote(group: RankGroup) -> set[int]:
    return {child.pid for child in psutil.Process(zygote_pid_of(group)).children()}


async def until_busy(pid: int) -> None:
    """Wait until a process computes."""
    process = psutil.Process(pid)
    before = process.cpu_times().user
    await until(lambda: process.cpu_times().user > before, f"process {pid} computes")
