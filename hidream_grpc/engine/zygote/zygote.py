"""The parent of every rank: imports torch and the model's code once, then forks on command.

A process that forks must have no other threads: a fork copies every lock, but only one thread that could
release them. Where the device's runtime does not survive a fork, the zygote imports nothing and each child is
a new interpreter. The zygote also reports to the server how each child ended. When it dies, the kernel kills
its children; when the server dies, the kernel kills the zygote.
"""

from __future__ import annotations

import gc
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setproctitle import setproctitle

from hidream_grpc.devices.device_types import StartMethod
from hidream_grpc.engine.protocol.channel import BlockingChannel
from hidream_grpc.engine.protocol.messages import (
    KillProcess,
    PrepareZygote,
    ProcessEnded,
    ProcessStarted,
    StartRank,
    StartRefused,
    StartStore,
    ZygoteCommand,
    ZygoteReady,
)
from hidream_grpc.engine.protocol.processes import die_with_parent, leave_signals_to_the_server, num_threads
from hidream_grpc.logs import configure_logging, end_logging

logger = logging.getLogger("hidream_grpc.engine.zygote.zygote")  # this module is __main__

# Each of these libraries starts its threads when it is imported or first used.
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class _Child:
    """A process that the zygote has started, and its pidfd."""

    pid: int
    pidfd: int


class Zygote:
    """Executes the server's commands, one at a time.

    Args:
        channel: connection to the server.
        socket_path: where ranks connect to the server.
        start_method: how children are started.
    """

    def __init__(
        self, channel: BlockingChannel[ZygoteCommand], socket_path: Path, start_method: StartMethod
    ) -> None:
        self._pid = os.getpid()
        self._channel = channel
        self._socket_path = socket_path
        self._start_method = start_method
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)

    def serve(self) -> None:
        """Execute commands until the server is gone; the kernel then kills the remaining children."""
        while True:
            for key, _events in self._selector.select():
                if isinstance(key.data, _Child):
                    self._reap(key.data)
                    continue
                command = self._channel.receive()
                if command is None:
                    return
                self._handle(command)

    def _handle(self, command: ZygoteCommand) -> None:
        match command:
            case StartRank() | StartStore():
                self._start(command)
            case KillProcess(pid=pid) if pid in self._children:
                signal.pidfd_send_signal(self._children[pid].pidfd, signal.SIGKILL)

    def _start(self, command: StartRank | StartStore) -> None:
        try:
            if isinstance(command, StartRank):
                self._start_rank(command.rank)
            else:
                self._start_store()
        except OSError as error:
            # The error must not end the zygote, and the other children with it.
            self._channel.send(StartRefused(reason=f"cannot start a process: {error.strerror}"))

    def _start_rank(self, rank: int) -> None:
        if self._start_method is StartMethod.EXEC:
            pid = self._exec("hidream_grpc.engine.rank.worker", str(self._socket_path), str(rank))
        else:
            if not self._may_fork():
                return
            from hidream_grpc.engine.rank.worker import work

            pid = self._fork(lambda: work(self._socket_path, rank))
        self._register(pid)
        self._channel.send(ProcessStarted(pid=pid))

    def _start_store(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            store_port: int = listener.getsockname()[1]
            if self._start_method is StartMethod.EXEC:
                listener.set_inheritable(True)
                pid = self._exec("hidream_grpc.engine.zygote.store_host", str(listener.fileno()))
            else:
                if not self._may_fork():
                    return
                from hidream_grpc.engine.zygote.store_host import host_store

                pid = self._fork(lambda: host_store(listener))
        self._register(pid)
        self._channel.send(ProcessStarted(pid=pid, store_port=store_port))

    def _may_fork(self) -> bool:
        threads = num_threads()
        if threads == 1:
            return True
        self._channel.send(
            StartRefused(reason=f"the zygote has {threads} threads and must not fork; a library started them")
        )
        return False

    def _fork(self, child_main: Callable[[], None]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        return pid or self._become_child(child_main)

    def _become_child(self, child_main: Callable[[], None]) -> NoReturn:
        exit_code = 1
        try:
            die_with_parent(self._pid)
            self._selector.close()
            self._channel.close()
            for child in self._children.values():
                os.close(child.pidfd)
            child_main()
            exit_code = 0
        except SystemExit as exit_request:
            exit_code = exit_request.code if isinstance(exit_request.code, int) else 1
        except BaseException:
            logger.exception("a child of the zygote failed")
        finally:
            end_logging()
            # Neither return into the zygote's frames nor run its exit handlers.
            os._exit(exit_code)

    def _exec(self, module: str, *arguments: str) -> int:
        command_line = [sys.executable, "-m", module, *arguments, str(self._pid)]
        return os.posix_spawn(sys.executable, command_line, os.environ)

    def _register(self, pid: int) -> None:
        try:
            child = _Child(pid, os.pidfd_open(pid))
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self._children[pid] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)

    def _reap(self, child: _Child) -> None:
        _pid, status = os.waitpid(child.pid, 0)
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        del self._children[child.pid]
        self._channel.send(ProcessEnded(pid=child.pid, exit_code=os.waitstatus_to_exitcode(status)))


def import_what_ranks_need() -> None:
    """Import torch and the model's code into this process without starting a thread."""
    os.environ.update(SINGLE_THREADED)
    import hidream_grpc.engine.rank.worker
    import hidream_grpc.engine.zygote.store_host  # noqa: F401

    gc.collect()
    # Otherwise the first collection in a child writes to every page of the imports, and so copies it.
    gc.freeze()


def main() -> None:
    """Entry point; arguments: file descriptor of the socket to the server, pid of the server."""
    control_fd, parent_pid = (int(argument) for argument in sys.argv[1:])
    die_with_parent(parent_pid)
    leave_signals_to_the_server()
    # Not for children that are exec'd: the end of file must tell the server that the zygote died.
    os.set_inheritable(control_fd, False)
    channel = BlockingChannel[ZygoteCommand](socket.socket(fileno=control_fd), ZygoteCommand)
    prepare = channel.receive()
    if not isinstance(prepare, PrepareZygote):
        return
    setproctitle("hidream-grpc zygote")
    configure_logging(prepare.log)
    os.environ.update(prepare.environment)
    # torch prints the C++ stack of every connection that a dead rank leaves, past all log settings.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    started = time.monotonic()
    if prepare.start_method is StartMethod.FORK:
        try:
            import_what_ranks_need()
        except ImportError as error:
            logger.exception("the zygote cannot import what ranks need")
            channel.send(StartRefused(reason=f"cannot import {error.name}: {error}"))
            return
    channel.send(ZygoteReady(import_seconds=time.monotonic() - started))
    Zygote(channel, prepare.socket_path, prepare.start_method).serve()


if __name__ == "__main__":
    main()
