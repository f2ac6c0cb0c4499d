from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hidream_grpc.engine.group.proc_stat import ProcessSample, sample_process, zombie_children
from tests.support.live_server import wait_until


@contextmanager
def process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_until_it(child: subprocess.Popen[bytes], is_so: Callable[[ProcessSample], bool]) -> None:
    wait_until(lambda: (sample := sample_process(child.pid)) is not None and is_so(sample), 20, "it is so")


def test_a_process_that_computes_is_runnable_and_uses_its_cpu() -> None:
    with process("while True: pass") as child:
        wait_until_it(child, lambda sample: sample.is_runnable and sample.cpu_seconds > 0.1)


def test_a_process_that_computes_in_another_thread_is_runnable_too() -> None:
    code = "\n".join(
        (
            "import hashlib, threading",
            "compute = lambda: [hashlib.pbkdf2_hmac('sha256', b'', b'', 10**6) for _ in range(99)]",
            "threading.Thread(target=compute).start()",
            "threading.Event().wait()",
        )
    )
    with process(code) as child:
        wait_until_it(child, lambda sample: sample.is_runnable and sample.cpu_seconds > 0.5)


def test_a_process_that_waits_is_not_runnable() -> None:
    with process("input()") as child:
        wait_until_it(child, lambda sample: not sample.is_runnable and not sample.is_stopped)


def test_a_stopped_process_is_seen() -> None:
    with process("while True: pass") as child:
        child.send_signal(signal.SIGSTOP)
        wait_until_it(child, lambda sample: sample.is_stopped and not sample.is_runnable)


def test_a_process_that_is_gone_has_no_sample() -> None:
    with process("") as child:
        child.wait()
        assert sample_process(child.pid) is None


def test_zombies_are_the_children_that_have_ended_of_any_thread() -> None:
    with process("") as ended, process("input()") as living:
        may_end = threading.Event()
        of_thread: list[subprocess.Popen[bytes]] = []

        def start_and_stay() -> None:
            of_thread.append(subprocess.Popen([sys.executable, "-c", ""]))
            may_end.wait()

        thread = threading.Thread(target=start_and_stay)
        thread.start()
        wait_until(lambda: len(of_thread) == 1, 20, "the thread has started its child")
        pids = {ended.pid, of_thread[0].pid}
        wait_until(lambda: zombie_children() >= pids, 20, "both have ended")
        assert living.pid not in zombie_children()
        ended.wait()
        of_thread[0].wait()
        assert not zombie_children() & pids
        may_end.set()
        thread.join()
