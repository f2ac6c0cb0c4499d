"""The loss of a rank ends all waiting for it, and a device that hangs is no rank that waits."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.engine.group.listener import RankListener
from hidream_grpc.engine.group.memory_gate import MemoryGate
from hidream_grpc.engine.group.rank_link import RankLink
from hidream_grpc.engine.group.zygote_link import ChildProcess, ZygoteLink
from hidream_grpc.engine.protocol.channel import AsyncChannel
from hidream_grpc.engine.protocol.collective_counter import CollectiveCounterReader
from hidream_grpc.engine.protocol.messages import (
    DeviceFacts,
    DeviceOpened,
    Event,
    Load,
    Loaded,
    LoadWeights,
    ModelFacts,
    StepPlan,
)
from hidream_grpc.engine.protocol.processes import OomKills
from hidream_grpc.errors import DeviceFailedError, InsufficientMemoryError, RankDiedError


class BrokenChannel:
    """A connection that fails once a message was sent."""

    def __init__(self) -> None:
        self._has_sent = asyncio.Event()

    async def send(self, _message: object) -> None:
        self._has_sent.set()

    async def receive(self) -> Event | None:
        await self._has_sent.wait()
        raise MemoryError

    async def close(self) -> None:
        pass


class Zygote:
    async def kill(self, child: ChildProcess, _grace_seconds: float = 0.0) -> int:
        if not child.exited.done():
            child.exited.set_result(-signal.SIGKILL)
        return -signal.SIGKILL


async def test_a_rank_whose_messages_cannot_be_taken_is_lost_and_killed_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    child = ChildProcess(4711, asyncio.get_running_loop().create_future(), 0)
    channel, zygote = cast(AsyncChannel[Event], BrokenChannel()), cast(ZygoteLink, Zygote())
    link = RankLink(0, child, channel, zygote, CollectiveCounterReader(tmp_path))
    is_lost = asyncio.Event()
    link.watch(is_lost.set)
    async with asyncio.timeout(10):
        with pytest.raises(RankDiedError, match="sent what cannot be taken"):
            await link.run(StepPlan(plan_id=1))
        await is_lost.wait()
        await link.end()
    assert child.exited.done()
    (record,) = caplog.records
    assert record.message == "what rank 0 sent cannot be taken"
    assert record.exc_info


class MortalZygote(Zygote):
    """A zygote whose ranks end at once."""

    folder: Path

    async def start_rank(self, _rank: int) -> ChildProcess:
        child = ChildProcess(4711, asyncio.get_running_loop().create_future(), 0)
        child.exited.set_result(-signal.SIGKILL)
        return child

    async def connection_of(self, _child: ChildProcess) -> None:
        return None


async def test_a_rank_that_the_kernel_kills_for_its_memory_while_it_loads_blames_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OomKills, "has_new", True)
    zygote = MortalZygote()
    zygote.folder = tmp_path

    async def may_load(_memory: DeviceMemory) -> None:
        raise AssertionError("it opened no device")

    with pytest.raises(InsufficientMemoryError, match="rank 3 cannot load for want of the host's memory"):
        await RankLink.start(
            3,
            lambda _path: cast(Load, None),
            may_load,
            10.0,
            cast(RankListener, zygote),
            cast(ZygoteLink, zygote),
        )


DEVICE = DeviceFacts(name="a device", total_memory_bytes=10, free_memory_bytes=9)
LOAD_SECONDS = 100.0


class ScriptedChannel:
    """The connection of a rank whose device opens at once, or hangs; it loads as soon as it may."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.sent: list[object] = []
        self._hangs = hangs
        self._answers: asyncio.Queue[Event | None] = asyncio.Queue()

    async def send(self, message: object) -> None:
        self.sent.append(message)
        if isinstance(message, LoadWeights):
            model = ModelFacts(scheduler_name="Flow", shift=1.0, num_parameters=1)
            self._answers.put_nowait(Loaded(load_seconds=1.0, model=model, device=DEVICE))
        elif not self._hangs and len(self.sent) == 1:
            self._answers.put_nowait(DeviceOpened(device=DEVICE))

    async def receive(self) -> Event | None:
        return await self._answers.get()

    async def close(self) -> None:
        self._answers.put_nowait(None)


class Starter(Zygote):
    """A zygote and listener for ranks whose connections are scripted."""

    def __init__(self, folder: Path, *channels: ScriptedChannel) -> None:
        self.folder = folder
        self.channels = channels
        self.children: dict[int, ChildProcess] = {}

    async def start_rank(self, rank: int) -> ChildProcess:
        self.children[rank] = ChildProcess(rank, asyncio.get_running_loop().create_future(), 0)
        return self.children[rank]

    async def connection_of(self, child: ChildProcess) -> ScriptedChannel:
        return self.channels[child.pid]

    async def kill(self, child: ChildProcess, grace_seconds: float = 0.0) -> int:
        await self.channels[child.pid].close()
        return await super().kill(child, grace_seconds)

    def start(self, rank: int, may_load: Callable[[DeviceMemory], Awaitable[None]]) -> asyncio.Task[RankLink]:
        listener, zygote = cast(RankListener, self), cast(ZygoteLink, self)
        return asyncio.create_task(
            RankLink.start(rank, lambda _path: cast(Load, "load"), may_load, LOAD_SECONDS, listener, zygote)
        )


async def until_quiet() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_device_that_hangs_while_it_is_opened_does_not_take_those_with_it_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_seconds = 0.0
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + late_seconds)
    starter = Starter(tmp_path, ScriptedChannel(), ScriptedChannel(hangs=True))
    gate = MemoryGate(range(2), lambda _devices: None)
    # The healthy rank starts first, so that its time would end first.
    healthy, hanging = (starter.start(rank, partial(gate.pass_through, rank)) for rank in range(2))
    hanging.add_done_callback(lambda _task: gate.leave(1))
    await until_quiet()
    late_seconds = LOAD_SECONDS
    with pytest.raises(DeviceFailedError, match="rank 1 did not load within 100 s") as failure:
        await hanging
    assert failure.value.took_too_long
    link = await healthy
    assert link.loaded is not None
    await link.end()


async def test_a_rank_that_dies_while_it_waits_for_the_others_is_lost_at_once(tmp_path: Path) -> None:
    starter = Starter(tmp_path, ScriptedChannel())
    gate = MemoryGate(range(2), lambda _devices: None)
    waiting = starter.start(0, partial(gate.pass_through, 0))
    await until_quiet()
    starter.children[0].exited.set_result(-signal.SIGKILL)
    await starter.channels[0].close()
    async with asyncio.timeout(10):
        with pytest.raises(RankDiedError, match="SIGKILL"):
            await waiting
