"""A request whose rank group is lost goes on from where it was, and ends in the same picture."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import msgspec
import pytest
import pytest_asyncio

from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.requests import (
    EngineEvent,
    RequestRestarted,
    SnapshotTaken,
    StepFinished,
)
from hidream_grpc.model.snapshot_format import PackedTensor, SnapshotIdentity, pack, unpack
from tests.support.rank_engine import RankEngine, running_engine
from tests.support.rank_groups import group_config, picture, zygote_pid_of

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_STEPS = 9
REQUEST = picture(num_inference_steps=NUM_STEPS, width=64, height=64, num_images=2)
_numbers = itertools.count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group() -> RankGroup:
    return RankGroup(group_config(2, timeouts=GroupTimeouts(load_seconds=120.0, init_seconds=1.0)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(group: RankGroup) -> AsyncIterator[RankEngine]:
    async with running_engine(group) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(engine: RankEngine) -> list[bytes]:
    return await engine.draw("undisturbed", REQUEST)


def after_step(step: int, act: Callable[[], None]) -> Callable[[EngineEvent], None]:
    """Act once, when a request is told of this step."""
    todo = [act]

    def on_event(event: EngineEvent) -> None:
        if isinstance(event, StepFinished) and event.step == step and todo:
            todo.pop()()

    return on_event


def killing(group: RankGroup, *ranks: int) -> Callable[[], None]:
    def kill() -> None:
        for pid in [group.rank_pids[rank] for rank in ranks]:
            os.kill(pid, signal.SIGKILL)

    return kill


def kill_all_ranks(group: RankGroup) -> None:
    killing(group, 0, 1)()


def kill_everything(group: RankGroup) -> None:
    for pid in (zygote_pid_of(group), *group.rank_pids):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
async def test_a_killed_rank_costs_no_step_that_was_done(
    engine: RankEngine, group: RankGroup, undisturbed: list[bytes], victim: int
) -> None:
    job_id, survivor = f"job {next(_numbers)}", group.rank_pids[1 - victim]
    engine.submit(job_id, REQUEST, after_step(NUM_STEPS - 3, killing(group, victim)))
    await engine.ended(job_id)
    (restart,) = engine.events(job_id, RequestRestarted)
    assert (restart.attempt, restart.resumed_from_step) == (2, NUM_STEPS - 3)
    assert engine.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert engine.images(job_id) == undisturbed
    assert group.rank_pids[1 - victim] == survivor


@pytest.mark.parametrize("kill", [kill_all_ranks, pytest.param(kill_everything, marks=pytest.mark.long)])
async def test_without_a_survivor_a_request_goes_on_from_its_newest_snapshot(
    engine: RankEngine, group: RankGroup, undisturbed: list[bytes], kill: Callable[[RankGroup], None]
) -> None:
    job_id = f"job {next(_numbers)}"
    engine.submit(job_id, REQUEST, after_step(NUM_STEPS - 3, lambda: kill(group)))
    await engine.ended(job_id)
    (restart,) = engine.events(job_id, RequestRestarted)
    events = engine.events(job_id, object)
    *_, newest = (e for e in events[: events.index(restart)] if isinstance(e, SnapshotTaken))
    assert restart.resumed_from_step == newest.step >= 1
    steps = [*range(1, NUM_STEPS - 2), *range(restart.resumed_from_step + 1, NUM_STEPS + 1)]
    assert engine.steps(job_id) == steps
    assert engine.images(job_id) == undisturbed


async def test_a_request_that_is_being_decoded_is_not_denoised_again(
    engine: RankEngine, group: RankGroup, undisturbed: list[bytes]
) -> None:
    job_id = f"job {next(_numbers)}"
    engine.submit(job_id, REQUEST, after_step(NUM_STEPS, killing(group, 1)))
    await engine.ended(job_id)
    (restart,) = engine.events(job_id, RequestRestarted)
    assert restart.resumed_from_step == NUM_STEPS
    assert engine.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert engine.images(job_id) == undisturbed


@pytest.mark.long
async def test_kills_from_outside_never_fail_a_request_however_many(
    engine: RankEngine, group: RankGroup, undisturbed: list[bytes]
) -> None:
    job_id = f"job {next(_numbers)}"
    victims = itertools.cycle((0, 1))

    def kill_after_every_third_step(event: EngineEvent) -> None:
        if isinstance(event, StepFinished) and event.step % 3 == 0:
            os.kill(group.rank_pids[next(victims)], signal.SIGKILL)

    engine.submit(job_id, REQUEST, kill_after_every_third_step)
    await engine.ended(job_id)
    assert len(engine.events(job_id, RequestRestarted)) == NUM_STEPS // 3
    assert engine.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert engine.images(job_id) == undisturbed


async def test_requests_of_all_sizes_go_on_together(engine: RankEngine, group: RankGroup) -> None:
    jobs = {
        f"job {next(_numbers)}": picture(num_inference_steps=8, width=side, height=64, seed=side)
        for side in (64, 96, 128)
    }
    first, *_ = jobs
    for job_id, request in jobs.items():
        engine.submit(job_id, request, after_step(5, killing(group, 0)) if job_id == first else nothing)
    await engine.ended(*jobs)
    for job_id in jobs:
        assert engine.steps(job_id) == list(range(1, 9))
        assert len(engine.images(job_id)) == 1


def nothing(_event: EngineEvent) -> None:
    """Leave a request alone."""


async def test_a_request_that_comes_with_a_snapshot_goes_on_from_it(
    engine: RankEngine, undisturbed: list[bytes]
) -> None:
    job_id, resumed_id = f"job {next(_numbers)}", f"job {next(_numbers)}"
    assert await engine.draw(job_id, REQUEST) == undisturbed
    snapshot = engine.events(job_id, SnapshotTaken)[0]
    engine.submit(resumed_id, REQUEST, snapshot=snapshot.data)
    await engine.ended(resumed_id)
    assert engine.steps(resumed_id) == list(range(snapshot.step + 1, NUM_STEPS + 1))
    assert engine.images(resumed_id) == undisturbed


def of_another_version(snapshot: bytes, _identity: SnapshotIdentity) -> bytes:
    return b"of another version" + snapshot


def with_a_flipped_bit(snapshot: bytes, _identity: SnapshotIdentity) -> bytes:
    altered = bytearray(snapshot)
    altered[len(altered) // 2] ^= 1
    return bytes(altered)


def of_another_seed(snapshot: bytes, identity: SnapshotIdentity) -> bytes:
    parameters = msgspec.structs.replace(identity.parameters, seed=8)
    return pack(unpack(snapshot, identity), replace(identity, parameters=parameters))


def of_another_checkpoint(snapshot: bytes, identity: SnapshotIdentity) -> bytes:
    return pack(unpack(snapshot, identity), replace(identity, checkpoint_fingerprint="0" * 16))


@pytest.mark.parametrize(
    ("altered", "reason"),
    [
        (with_a_flipped_bit, "altered or cut"),
        pytest.param(of_another_version, "not a snapshot of version 2", marks=pytest.mark.long),
        pytest.param(of_another_seed, "of another request", marks=pytest.mark.long),
        pytest.param(of_another_checkpoint, "of another checkpoint", marks=pytest.mark.long),
    ],
)
async def test_a_snapshot_that_is_not_the_requests_own_costs_the_steps_and_not_the_request(
    altered: Callable[[bytes, SnapshotIdentity], bytes],
    reason: str,
    engine: RankEngine,
    group: RankGroup,
    undisturbed: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    snapshot = engine.events("undisturbed", SnapshotTaken)[-1].data
    identity = SnapshotIdentity(REQUEST, group.checkpoint_fingerprint)
    job_id = f"job {next(_numbers)}"
    engine.submit(job_id, REQUEST, snapshot=altered(snapshot, identity))
    await engine.ended(job_id)
    assert engine.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert not engine.events(job_id, RequestRestarted)
    assert engine.images(job_id) == undisturbed
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert reason in warning.getMessage()
    assert warning.__dict__["job_id"] == job_id


async def test_a_snapshot_that_only_the_ranks_can_refuse_costs_the_steps_and_not_the_request(
    engine: RankEngine, group: RankGroup, undisturbed: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """One of a replica whose devices draw in another precision."""
    identity = SnapshotIdentity(REQUEST, group.checkpoint_fingerprint)
    own = unpack(engine.events("undisturbed", SnapshotTaken)[-1].data, identity)
    halved = PackedTensor("bfloat16", own.latents.shape, bytes(len(own.latents.data) // 2))
    job_id, next_id = f"job {next(_numbers)}", f"job {next(_numbers)}"
    engine.submit(job_id, REQUEST, snapshot=pack(msgspec.structs.replace(own, latents=halved), identity))
    await engine.ended(job_id)
    (restart,) = engine.events(job_id, RequestRestarted)
    assert (restart.attempt, restart.resumed_from_step) == (2, 0)
    assert engine.steps(job_id) == list(range(1, NUM_STEPS + 1))
    assert engine.images(job_id) == undisturbed
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "of torch.bfloat16, not" in warning.getMessage()
    assert await engine.draw(next_id, REQUEST) == undisturbed
