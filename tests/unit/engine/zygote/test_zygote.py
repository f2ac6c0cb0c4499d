from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from hidream_grpc.devices.base import StartMethod
from hidream_grpc.engine.protocol.channel import BlockingChannel
from hidream_grpc.engine.protocol.messages import (
    StartRank,
    StartRefused,
    StartStore,
    ZygoteCommand,
    ZygoteEvent,
)
from hidream_grpc.engine.zygote import zygote as zygote_module
from hidream_grpc.engine.zygote.zygote import Zygote


@pytest.mark.parametrize("command", [StartRank(rank=0), StartStore()], ids=["a rank", "the store"])
def test_a_zygote_with_threads_refuses_to_fork(command: ZygoteCommand, tmp_path: Path) -> None:
    server_end, zygote_end = socket.socketpair()
    server = BlockingChannel[ZygoteEvent](server_end, ZygoteEvent)
    zygote = Zygote(BlockingChannel[ZygoteCommand](zygote_end, ZygoteCommand), tmp_path, StartMethod.FORK)
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        server.send(command)
        server_end.shutdown(socket.SHUT_WR)
        zygote.serve()
        refusal = server.receive()
    finally:
        release.set()
        thread.join()
        server.close()
        zygote_end.close()
    assert isinstance(refusal, StartRefused)
    assert "threads and must not fork" in refusal.reason


@pytest.mark.parametrize("command", [StartRank(rank=0), StartStore()], ids=["a rank", "the store"])
def test_a_zygote_that_the_system_lets_start_no_process_says_so_and_goes_on(
    command: ZygoteCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", no_process)
    monkeypatch.setattr(zygote_module, "num_threads", lambda: 1)
    server_end, zygote_end = socket.socketpair()
    server = BlockingChannel[ZygoteEvent](server_end, ZygoteEvent)
    zygote = Zygote(BlockingChannel[ZygoteCommand](zygote_end, ZygoteCommand), tmp_path, StartMethod.FORK)
    for _ in range(2):
        server.send(command)
    server_end.shutdown(socket.SHUT_WR)
    zygote.serve()
    refusals = [server.receive() for _ in range(2)]
    assert refusals == [StartRefused(reason=f"cannot start a process: {os.strerror(errno.EAGAIN)}")] * 2
    server.close()
    zygote_end.close()
