"""How a process gets children from one that has imported everything, instead of starting interpreters.

Of the standard library alone: the interpreter of a server imports this before anything else.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ZYGOTE_MODULE = "hidream_grpc.engine.zygote.zygote"
WORKER_WORDS = [sys.executable, "-u", "-c", "import sys;exec(eval(sys.stdin.readline()))"]
"""Command line of a worker of pytest-xdist, by execnet 2."""

MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""A variable that glibc reads at the start of a process."""
MESSAGE_BYTES = 128 * 1024

_START = "_fork_exec"  # of CPython's subprocess, since 3.11


@dataclass(frozen=True, slots=True)
class Start:
    """A process that is about to be started.

    Attributes:
        words: of its command line.
        folder: where it starts; None where this process is.
        environment: of the process; None for the one of this process.
        streams: files for its standard streams; -1 for those of this process.
        inherited: other files that it is to have.
    """

    words: list[str]
    folder: str | None
    environment: dict[str, str] | None
    streams: tuple[int, int, int]
    inherited: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WaitingProcess:
    """A warm process, a child of this one, and the socket to it."""

    channel: socket.socket
    pid: int


waiting: WaitingProcess | None = None
"""The warm process of a worker that was forked itself, forked before it."""


def replace_starts(make: Callable[[Start], int | None]) -> None:
    """Let `make` start the processes that this one starts from now on.

    Args:
        make: returns the id of the new process, a child of this one, or None to have it started as ever.
    """
    start_as_ever = getattr(subprocess, _START)

    def start(words: Sequence[str | bytes], *rest: Any) -> int:
        _programs, _close, kept, folder, variables, stdin, _, _, stdout, _, stderr, _, report = rest[:13]
        environment = None if variables is None else dict(os.fsdecode(v).split("=", 1) for v in variables)
        pid = make(
            Start(
                [os.fsdecode(word) for word in words],
                None if folder is None else os.fsdecode(folder),
                environment,
                (stdin, stdout, stderr),
                # The pipe through which exec reports that it failed.
                tuple(set(kept) - {report}),
            )
        )
        return int(start_as_ever(words, *rest)) if pid is None else pid

    setattr(subprocess, _START, start)


def hand_over_zygote(channel: socket.socket, zygote_pid: int) -> None:
    """Take the process that waits at this channel as the first zygote of this server, whose child it is."""
    waiting = [channel]

    def make(start: Start) -> int | None:
        # When this zygote is lost, the next one is started as ever.
        if ZYGOTE_MODULE not in start.words or not waiting:
            return None
        with waiting.pop() as first_channel:
            send(first_channel, start.words, (*start.streams, *start.inherited))
        return zygote_pid

    replace_starts(make)


def send(channel: socket.socket, message: object, files: Sequence[int] = ()) -> None:
    """Send one message and open files with it; the channel keeps messages apart (SOCK_SEQPACKET)."""
    socket.send_fds(channel, [json.dumps(message).encode()], list(files))


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """The next message and its files; raises EOFError once the other end is gone."""
    data, files, _flags, _address = socket.recv_fds(channel, MESSAGE_BYTES, 8, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise EOFError
    return json.loads(data), files
