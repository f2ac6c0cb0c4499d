from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hidream_grpc.engine.protocol import processes
from hidream_grpc.engine.protocol.processes import (
    OomKills,
    cause_of_exit,
    describe_exit,
    wait_until_gone,
)
from hidream_grpc.errors import LossCause


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "ended with exit code 0"),
        (3, "ended with exit code 3"),
        (-signal.SIGKILL, "killed by SIGKILL"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-200, "killed by signal 200"),
    ],
)
def test_the_operator_reads_how_a_process_ended(exit_code: int, words: str) -> None:
    assert describe_exit(exit_code) == words


def test_every_thread_is_counted() -> None:
    # In a process of its own: threads of other tests end at any moment.
    code = """
import threading
from hidream_grpc.engine.protocol.processes import num_threads
before = num_threads()
release = threading.Event()
threading.Thread(target=release.wait).start()
print(num_threads() - before)
release.set()
"""
    counted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert counted.stdout == "1\n"


async def test_the_end_of_a_process_is_noticed() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
    )
    gone = asyncio.ensure_future(wait_until_gone(process.pid))
    done, _ = await asyncio.wait((gone,), timeout=0.05)
    assert not done
    process.kill()
    await asyncio.wait_for(gone, 10)
    await process.wait()


async def test_a_process_that_is_gone_is_not_waited_for() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    await asyncio.wait_for(wait_until_gone(process.pid), 10)


@pytest.fixture
def no_file_descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Let as many calls as the list has entries find no free file descriptor."""
    failures: list[None] = []
    open_pidfd, read_text = os.pidfd_open, Path.read_text

    def failing_open(pid: int) -> int:
        fail_while(failures)
        return open_pidfd(pid)

    def failing_read(path: Path, **options: str) -> str:
        fail_while(failures)
        return read_text(path, **options)

    monkeypatch.setattr(os, "pidfd_open", failing_open)
    monkeypatch.setattr(Path, "read_text", failing_read)
    monkeypatch.setattr(processes, "RETRY_SECONDS", 0.0)
    yield failures
    assert not failures


def fail_while(failures: list[None]) -> None:
    if failures:
        failures.pop()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def test_the_end_of_a_process_is_noticed_once_there_are_file_descriptors_again(
    no_file_descriptors: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
    )
    no_file_descriptors += [None] * 3
    gone = asyncio.ensure_future(wait_until_gone(process.pid))
    process.kill()
    await asyncio.wait_for(gone, 10)
    await process.wait()
    assert [record.message for record in caplog.records] == [
        f"cannot wait for the end of process {process.pid}: [Errno 24] Too many open files; trying again"
    ]


def test_a_death_is_none_for_want_of_memory_while_that_cannot_be_found_out(
    no_file_descriptors: list[None], caplog: pytest.LogCaptureFixture
) -> None:
    no_file_descriptors += [None] * 3
    oom_kills = OomKills()
    oom_kills.note()
    assert cause_of_exit(-signal.SIGKILL, oom_kills) is LossCause.OUTSIDE
    oom_kills.note()
    assert cause_of_exit(-signal.SIGKILL, oom_kills) is LossCause.OUTSIDE
    assert len(caplog.records) == 1


def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once() -> None:
    code = (
        "from hidream_grpc.engine.protocol.processes import die_with_parent; "
        "die_with_parent({}); print('alive')"
    )
    orphan = subprocess.run(
        [sys.executable, "-c", code.format(os.getppid())], capture_output=True, text=True, check=False
    )
    assert (orphan.returncode, orphan.stdout) == (1, "")
    child = subprocess.run(
        [sys.executable, "-c", code.format(os.getpid())], capture_output=True, text=True, check=True
    )
    assert child.stdout == "alive\n"
