"""A process that has imported what servers and ranks need: its forks are the servers and zygotes of tests.

A zygote must be a child of the process that it serves. For the process of the tests, which is the parent
of this one, a fork is made whose parent it is (CLONE_PARENT). For a server, such a fork makes one more, which
waits to become the zygote, and then becomes the server, whose child it stays. The workers of a run in
parallel are such forks of the first process too, each with a warm process of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import platform
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from setproctitle import setproctitle

from hidream_grpc.engine.protocol.processes import num_threads
from hidream_grpc.engine.zygote import zygote
from tests.support.warm_zygotes import handover
from tests.support.warm_zygotes.handover import WORKER_WORDS, ZYGOTE_MODULE, receive, send

_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE_PARENT = 0x8000  # linux/sched.h
_M_MMAP_THRESHOLD = -3  # malloc.h


def is_possible() -> bool:
    """Whether this machine's number of the system call is known."""
    return sys.platform == "linux" and platform.machine() in _SYS_CLONE


def main() -> None:
    """Entry point: the file descriptor of the socket to the tests."""
    descriptor = int(sys.argv[1])
    channel = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    # The first title finds where titles go, from the variables that were there at the start.
    setproctitle("tests: warm process")
    # As the zygote does before its imports.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    zygote.import_what_ranks_need()
    # Not before: numpy starts threads unless it is told not to.
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # A table of a thousand regular expressions, which a rank makes for its first text encoder.
    get_checkpoint_conversion_mapping("t5")
    importlib.import_module("hidream_grpc.cli")
    # A package that brings a plugin, which pytest would rewrite and warns of when it is there before.
    sys.modules["anyio"].__doc__ = "PYTEST_DONT_REWRITE"
    # What is here already is no garbage of a server or a rank.
    gc.freeze()
    if num_threads() != 1:
        raise RuntimeError("a process with threads must not fork")
    _make_children(channel)


def _make_children(channel: socket.socket) -> None:
    """Fork at every request until the tests are gone."""
    while True:
        try:
            request, files = receive(channel)
        except EOFError:
            return
        pid = _fork_beside()
        if pid == 0:
            _become(channel, request, files)
        for file in files:
            os.close(file)
        send(channel, pid)


def _fork_beside() -> int:
    """Fork as os.fork does, but the new process is a child of this one's parent."""
    python = ctypes.pythonapi
    python.PyOS_BeforeFork()
    # Not ctypes.CDLL, which would let go of the interpreter's lock.
    pid = int(
        ctypes.PyDLL(None).syscall(_SYS_CLONE[platform.machine()], _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
    )
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError("this process cannot be forked")
    return pid


def _become(channel: socket.socket, request: dict[str, Any], files: list[int]) -> NoReturn:
    try:
        channel.close()
        if ZYGOTE_MODULE in request["words"]:
            _work_as_zygote(request["words"], files, request["environment"])
        elif request["words"] == WORKER_WORDS:
            _work_for_pytest(request, files)
        else:
            _become_program(request, files)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _work_for_pytest(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run the tests that the process at the other end of the standard streams sends."""
    channel, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    warm_pid = os.fork()
    if warm_pid == 0:
        channel.close()
        _take_streams([os.open(os.devnull, os.O_RDWR), files[2]])
        for file in files[:2]:
            os.close(file)
        _make_children(its_end)
        os._exit(0)
    its_end.close()
    os.chdir(request["folder"])
    _take_environment(request["environment"])
    _take_streams(files)
    setproctitle("tests: worker")
    handover.waiting = handover.WaitingProcess(channel, warm_pid)
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    _run_to_the_end(lambda: exec(request["words"][-1], vars(module)))


def _become_program(request: dict[str, Any], files: list[int]) -> NoReturn:
    server_end, zygote_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment: dict[str, str] = request["environment"]
    waiting_pid = os.fork()
    if waiting_pid == 0:
        server_end.close()
        for file in files:
            os.close(file)
        _wait_to_be_a_zygote(zygote_end, environment)
    zygote_end.close()
    os.chdir(request["folder"])
    _take_streams(files)
    # A fault is in the modules that an interpreter finds at its start.
    if environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH"):
        handover.hand_over_zygote(server_end, waiting_pid)
        _run_program(request["words"], environment)
    _execute_program(request["words"], environment, server_end, waiting_pid)


def _run_program(words: list[str], environment: dict[str, str]) -> NoReturn:
    """Do as a new interpreter does with this command line."""
    _replace_environment(environment)
    # A name of a file may be no text.
    setproctitle(" ".join(words).encode(errors="replace").decode())
    sys.argv = [words[0], *words[3:]]
    _run_to_the_end(lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True))


def _run_to_the_end(main: Callable[[], object]) -> NoReturn:
    """Do this, then what an interpreter does at its end."""
    code: Any = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _execute_program(
    words: list[str], environment: dict[str, str], channel: socket.socket, zygote_pid: int
) -> NoReturn:
    channel.set_inheritable(True)
    environment["WAITING_ZYGOTE"] = f"{channel.fileno()} {zygote_pid}"
    environment["PYTHONPATH"] = os.pathsep.join(
        (str(Path(__file__).parent), environment.get("PYTHONPATH", ""))
    )
    # Python ignores them, and an ignored signal stays so.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(words[0], words, environment)


def _wait_to_be_a_zygote(channel: socket.socket, environment: dict[str, str]) -> NoReturn:
    try:
        words, files = receive(channel)
        channel.close()
        _work_as_zygote(words, files, environment)
        os._exit(0)
    except EOFError:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _work_as_zygote(words: list[str], files: list[int], environment: dict[str, str]) -> None:
    """Do as a new interpreter does with this command line.

    Args:
        words: the last two are the number of the socket to its server, and the server's process id.
        files: its standard streams, and that socket.
        environment: of the new interpreter.
    """
    os.setsid()
    _take_environment(environment)
    _take_streams(files[:3])
    sys.argv = [zygote.__file__, str(files[3]), words[-1]]
    zygote.main()


def _take_environment(environment: dict[str, str]) -> None:
    """Have these variables, and the module of faults that a new interpreter would find with them."""
    _replace_environment(environment)
    if handover.MMAP_THRESHOLD in environment:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, int(environment[handover.MMAP_THRESHOLD]))
    new_folders = [f for f in environment.get("PYTHONPATH", "").split(os.pathsep) if f and f not in sys.path]
    sys.path[:0] = new_folders
    if new_folders and find_spec("sitecustomize") is not None:
        importlib.import_module("sitecustomize")


def _replace_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # Found in the variables at its first use.
    tempfile.tempdir = None


def _take_streams(files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)


if __name__ == "__main__":
    main()
