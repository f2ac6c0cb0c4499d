"""The loss of a rank is told to all who wait for it, whatever broke its connection."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import cast

import pytest

from hidream_grpc.devices.base import DeviceMemory
from hidream_grpc.engine.channel import AsyncChannel
from hidream_grpc.engine.listener import RankListener
from hidream_grpc.engine.messages import Event, Load, StepPlan
from hidream_grpc.engine.processes import OomKills
from hidream_grpc.engine.pulse import PulseReader
from hidream_grpc.engine.rank_link import RankLink
from hidream_grpc.engine.zygote_link import ChildProcess, ZygoteLink
from hidream_grpc.errors import InsufficientMemoryError, RankDiedError


class BrokenChannel:
    """A connection that fails once something was sent."""

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
    link = RankLink(0, child, channel, zygote, PulseReader(tmp_path))
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
    """Starts ranks that are gone at once."""

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
