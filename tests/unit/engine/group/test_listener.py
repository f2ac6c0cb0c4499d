from __future__ import annotations

import asyncio
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hidream_grpc.engine.group.listener import RankListener
from hidream_grpc.engine.group.zygote_link import ChildProcess
from hidream_grpc.engine.protocol.channel import BlockingChannel
from hidream_grpc.engine.protocol.messages import PROTOCOL_VERSION, Command, Event, Hello
from hidream_grpc.errors import ConfigurationError


@pytest.fixture
async def listener() -> AsyncIterator[RankListener]:
    listener = RankListener()
    await listener.start()
    yield listener
    await listener.stop()


def child(pid: int) -> ChildProcess:
    return ChildProcess(pid, asyncio.get_running_loop().create_future(), 0)


async def test_only_this_user_may_knock_and_nothing_is_left_after(tmp_path: Path) -> None:
    listener = RankListener()
    await listener.start()
    folder = listener.socket_path.parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    await listener.stop()
    await listener.stop()
    assert not folder.exists()


@pytest.mark.parametrize("connects_first", [True, False], ids=["known after", "known before"])
async def test_a_rank_finds_whoever_waits_for_it(listener: RankListener, connects_first: bool) -> None:
    if not connects_first:
        waiting = asyncio.create_task(listener.connection_of(child(os.getpid())))
    rank = await asyncio.to_thread(BlockingChannel[Command].connect, listener.socket_path, Command)
    rank.send(Hello(rank=0, pid=os.getpid()))
    if connects_first:
        waiting = asyncio.create_task(listener.connection_of(child(os.getpid())))
    channel = await asyncio.wait_for(waiting, 10)
    assert channel is not None
    rank.close()
    assert await channel.receive() is None
    await channel.close()


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(Hello(rank=0, pid=1), id="in another's name"),
        pytest.param(
            Hello(rank=0, pid=os.getpid(), protocol_version=PROTOCOL_VERSION + 1), id="of another version"
        ),
    ],
)
async def test_a_stranger_is_turned_away(listener: RankListener, greeting: Event) -> None:
    stranger = await asyncio.to_thread(BlockingChannel[Command].connect, listener.socket_path, Command)
    stranger.send(greeting)
    assert await asyncio.wait_for(asyncio.to_thread(stranger.receive), 10) is None
    stranger.close()


async def test_nobody_waits_for_a_rank_that_ended_before_it_knocked(listener: RankListener) -> None:
    dead = child(os.getpid())
    waiting = asyncio.create_task(listener.connection_of(dead))
    dead.exited.set_result(1)
    assert await asyncio.wait_for(waiting, 10) is None


async def test_a_folder_too_deep_for_a_socket_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    listener = RankListener()
    with pytest.raises(ConfigurationError, match="TMPDIR"):
        await listener.start()
    await listener.stop()
    assert list(deep.iterdir()) == []
