"""A group whose devices do not come back goes on with those that work, and takes all again when asked."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from hidream_grpc.devices.detect import select_devices
from hidream_grpc.devices.device_types import CPU
from hidream_grpc.engine.group import rank_group
from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.requests import EngineEvent, RequestRestarted, StepFinished
from hidream_grpc.errors import DeviceFailedError, RankDiedError, RestartRequestedError, StartupError
from hidream_grpc.model.parallel.layout import Layout
from tests.support.faulty_ranks import Devices, faults, send
from tests.support.rank_engine import running_engine
from tests.support.rank_groups import draw, group_config, picture, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_STEPS = 20
REQUEST = picture(num_inference_steps=NUM_STEPS, width=128, height=128)
TIMEOUTS = GroupTimeouts(load_seconds=120.0, init_seconds=1.0)


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is broken by a test needs no time to come back."""
    monkeypatch.setattr(rank_group, "DEVICE_PAUSE_SECONDS", 0.02)


@pytest.fixture
def devices(tmp_path: Path) -> Iterator[Devices]:
    with faults(tmp_path) as devices:
        yield devices


@pytest_asyncio.fixture(loop_scope="module")
async def group(devices: Devices) -> AsyncIterator[RankGroup]:
    """Three devices of which a layout uses two; alone the layouts go down to one."""
    group = RankGroup(
        group_config(
            2,
            devices=select_devices(CPU, (0, 1, 2)),
            smaller_layouts=(Layout(),),
            timeouts=TIMEOUTS,
        )
    )
    yield group
    await group.stop()


def used(group: RankGroup) -> tuple[int, ...]:
    return group.placement.devices.devices


@pytest.mark.long
async def test_a_device_that_does_not_come_back_is_replaced_by_a_spare_one_and_then_done_without(
    group: RankGroup, devices: Devices
) -> None:
    await group.start()
    undisturbed = await draw(group, picture())
    assert used(group) == (0, 1)

    devices.break_(0)
    send(group, signal.SIGKILL, 0)
    await group.wait_for_loss()
    await group.recover()
    assert used(group) == (1, 2)
    assert await draw(group, picture()) == undisturbed

    devices.break_(2)
    send(group, signal.SIGKILL, 1)
    await group.wait_for_loss()
    await group.recover()
    assert (used(group), group.placement.layout) == ((1,), Layout())
    assert group.placement.devices.idle_devices == (0, 2)
    assert len(group.loaded) == group.world_size == 1
    # Images of one device and of two differ by rounding alone: tests/numerics/test_layouts.py.
    assert await draw(group, picture())

    devices.repair_all()
    assert group.ask_for_full_layout()
    assert isinstance(await group.wait_for_loss(), RestartRequestedError)
    await group.recover()
    assert used(group) == (0, 1)
    assert await draw(group, picture()) == undisturbed
    assert not group.ask_for_full_layout()


@pytest.mark.long
async def test_a_group_that_is_asked_back_too_early_stays_on_what_works(
    group: RankGroup, devices: Devices
) -> None:
    devices.break_(0, 2)
    await group.start()
    assert used(group) == (1,)
    assert group.ask_for_full_layout()
    await group.recover()
    assert used(group) == (1,)
    assert await draw(group, picture())


async def test_without_any_device_the_group_does_not_start_and_says_why(
    group: RankGroup, devices: Devices
) -> None:
    devices.break_(0, 1, 2)
    with pytest.raises(DeviceFailedError, match="device 2 has fallen off the bus"):
        await group.start()


async def test_a_bad_checkpoint_is_not_taken_for_a_broken_device(tmp_path: Path) -> None:
    group = RankGroup(
        group_config(2, model_path=tmp_path, checkpoint_fingerprint="", smaller_layouts=(Layout(),))
    )
    with pytest.raises(StartupError, match="no such file") as refused:
        await group.start()
    assert not isinstance(refused.value, DeviceFailedError)
    assert group.placement.layout == group.full_layout


@pytest.mark.long
async def test_kills_from_outside_cost_no_device(group: RankGroup) -> None:
    await group.start()
    for _ in range(2):
        send(group, signal.SIGKILL, 0, 1)
        await group.wait_for_loss()
        await group.recover()
    assert used(group) == (0, 1)


async def test_once_no_device_works_the_group_is_lost_until_one_does(
    group: RankGroup, devices: Devices
) -> None:
    await group.start()
    devices.break_(0, 1, 2)
    send(group, signal.SIGKILL, 0)
    await group.wait_for_loss()
    with pytest.raises(RankDiedError, match="fallen off the bus"):
        await group.recover()
    devices.repair_all()
    await group.recover()
    assert used(group) == (0, 1)


async def test_a_running_request_goes_on_with_fewer_devices_and_then_with_all_again(
    group: RankGroup, devices: Devices
) -> None:
    async with running_engine(group) as engine:
        devices.break_(1, 2)

        def on_event(event: EngineEvent) -> None:
            if isinstance(event, StepFinished) and event.step == 5:
                send(group, signal.SIGKILL, 1)
            if isinstance(event, StepFinished) and event.step == 15:
                assert used(group) == (0,)
                devices.repair_all()
                assert group.ask_for_full_layout()

        engine.submit("job", REQUEST, on_event)
        await engine.ended("job")
        restarts = engine.events("job", RequestRestarted)
        # The ranks that had to go handed over what they had.
        assert [restart.resumed_from_step for restart in restarts] == [5, 15]
        assert engine.steps("job") == list(range(1, NUM_STEPS + 1))
        assert used(group) == (0, 1)
        assert len(engine.images("job")) == 1


async def test_requests_wait_while_no_device_works(group: RankGroup, devices: Devices) -> None:
    async with running_engine(group) as engine:
        assert len(await engine.draw("before", picture())) == 1
        devices.break_(0, 1, 2)
        send(group, signal.SIGKILL, 0)
        await until(lambda: not engine.is_serving.is_set(), "the loss is noticed")
        engine.submit("waits", picture())
        await asyncio.wait_for(engine.has_failed.wait(), 60)
        devices.repair_all()
        await engine.ended("waits")
        assert len(engine.images("waits")) == 1
