from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hidream_grpc.devices.device_types import StartMethod
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


def test_a_zygote_has_imported_all_of_a_rank_and_started_no_thread_before_it_forks() -> None:
    # Otherwise the first rank waits for the imports, and no page of them is frozen for the others.
    code = (
        "import gc, sys; from hidream_grpc.engine.protocol.processes import num_threads;"
        "from hidream_grpc.engine.zygote import zygote; zygote.import_what_ranks_need();"
        "before = set(sys.modules); num_frozen = gc.get_freeze_count();"
        "import hidream_grpc.engine.rank.worker, hidream_grpc.engine.zygote.store_host;"
        "print(num_threads(), num_frozen > 100_000, 'torch' in before, set(sys.modules) - before)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert printed.split(maxsplit=3) == ["1", "True", "True", "set()\n"]
