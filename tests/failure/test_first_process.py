"""A server that is the first process of its container."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from tests.support.live_server import STOP_TIMEOUT_SECONDS, running_server, wait_until

# What the first process of a container is to orphans; an exec keeps it, and children do not inherit it.
ADOPT_ORPHANS = """
import ctypes, sys
if "serve" in sys.orig_argv:
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
"""


def test_the_children_of_a_killed_zygote_leave_no_zombies_and_the_ranks_come_back(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ADOPT_ORPHANS, encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with running_server("--devices", "0", environment={"PYTHONPATH": path}) as server:
        first = server.descendants()
        (zygote,) = psutil.Process(server.pid).children()
        assert len(first) == 3  # zygote, store, rank
        os.kill(zygote.pid, signal.SIGKILL)
        wait_until(lambda: not any(process.is_running() for process in first), 60, "no zombie is left")
        wait_until(lambda: "the rank group is back" in server.log, 120, "the ranks are back")
        server.process.terminate()
        server.process.wait(STOP_TIMEOUT_SECONDS)
    assert server.process.returncode == 0
    # Its exit status went to what waits for it.
    assert "their zygote was lost: killed by SIGKILL" in server.log
