from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading

import pytest

from hidream_grpc.engine.processes import describe_exit, num_threads, wait_until_gone


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
    before = num_threads()
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    try:
        assert num_threads() == before + 1
    finally:
        release.set()
        thread.join()


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


def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once() -> None:
    code = "from hidream_grpc.engine.processes import die_with_parent; die_with_parent({}); print('alive')"
    orphan = subprocess.run(
        [sys.executable, "-c", code.format(os.getppid())], capture_output=True, text=True, check=False
    )
    assert (orphan.returncode, orphan.stdout) == (1, "")
    child = subprocess.run(
        [sys.executable, "-c", code.format(os.getpid())], capture_output=True, text=True, check=True
    )
    assert child.stdout == "alive\n"
