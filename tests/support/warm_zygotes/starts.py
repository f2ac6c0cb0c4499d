"""What tests start, and the workers that run them, are forks of a warm process.

To import torch, the libraries of the model and those of the server takes seconds of a core, at every start.
What is left out here is that import alone: servers, zygotes and ranks do all that they do, and a zygote that
replaces a lost one is a new interpreter. A server whose clock or devices a test changes is a new interpreter
too. With `--long` everything starts as ever.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tests.support.warm_zygotes import handover
from tests.support.warm_zygotes.handover import (
    WORKER_WORDS,
    ZYGOTE_MODULE,
    Start,
    WaitingProcess,
    receive,
    replace_starts,
    send,
)
from tests.support.warm_zygotes.warm_process import is_possible

COLD = {"START": "cold"}
"""Variables of a server that is to start as ever, seconds before its ranks are there."""

_SERVE = [sys.executable, "-m", "hidream_grpc", "serve"]
_PROGRAMS = (
    *("pytest", "scripts.bench.", "tests.numerics.", "tests.support.busy_rank_group"),
    "tests.contract.acknowledged_jobs",
)
"""Modules that tests run with `python -m`, and whose imports are no part of what is tested."""
# What may differ from the environment of the warm process: its forks take it over, and no library has read it
# when it was imported. (torch sets the folder of its compiler, also in the process of the tests.)
_MAY_DIFFER = {
    *("PYTEST_CURRENT_TEST", "PYTHONPATH", "BROKEN_DEVICES", "STEPPED_CLOCK", "XDG_DATA_HOME"),
    *("TORCHINDUCTOR_CACHE_DIR", "OMP_NUM_THREADS", "TMPDIR", handover.MMAP_THRESHOLD),
}


class _WarmProcess:
    """The process that is forked; it starts when it is first needed."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._lock = threading.Lock()
        self._process = handover.waiting

    def make(self, start: Start) -> int | None:
        """A child of this process, or None where it must be started as ever."""
        if not _can_be_forked(start.words):
            return None
        environment = dict(os.environ) if start.environment is None else start.environment
        if not self._is_like_this(environment):
            return None
        request = {
            "words": start.words,
            "folder": start.folder or str(Path.cwd()),
            "environment": environment,
        }
        streams = [number if file == -1 else file for number, file in enumerate(start.streams)]
        with self._lock:
            process = self._process = self._process or self._start()
            send(process.channel, request, (*streams, *start.inherited))
            pid, _files = receive(process.channel)
        return int(pid)

    def close(self) -> None:
        """End the process; what was forked from it goes on."""
        with self._lock:
            if self._process is not None:
                self._process.channel.close()
                os.waitpid(self._process.pid, 0)

    def _is_like_this(self, environment: dict[str, str]) -> bool:
        names = {name for name, _value in self._environment.items() ^ environment.items()}
        return all(name in _MAY_DIFFER or name.startswith(("AWS_", "HIDREAM_", "OTEL_")) for name in names)

    def _start(self) -> WaitingProcess:
        channel, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm_zygotes.warm_process", str(its_end.fileno())],
                cwd=Path(__file__).parents[3],
                env=self._environment,
                pass_fds=(its_end.fileno(),),
                start_new_session=True,
            )
        # It is waited for by its id, as one that was forked.
        process.returncode = 0
        return WaitingProcess(channel, process.pid)


def _can_be_forked(words: list[str]) -> bool:
    if words == WORKER_WORDS or ZYGOTE_MODULE in words or words[:4] == _SERVE:
        return True
    return words[:2] == _SERVE[:2] and words[2].startswith(_PROGRAMS)


def start_warm() -> Callable[[], None]:
    """Start servers and zygotes so from now on, where this machine can; returns what ends it."""
    warm = _WarmProcess()
    if is_possible():
        replace_starts(warm.make)
    return warm.close
