from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

# Starts children of its own that end with 7, and orphans; all zombies must go, and no status be stolen.
SCRIPT = """
import asyncio, contextlib, ctypes, os, sys
from hidream_grpc.engine.group.proc_stat import zombie_children
from hidream_grpc.server import adopted_children

if sys.argv[1] == "subreaper":
    assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
adopted_children.SAMPLE_INTERVAL_SECONDS = 0.1


async def main():
    assert adopted_children.adopts_orphans() == (sys.argv[1] != "neither")
    reaping = asyncio.create_task(adopted_children.reap_adopted_children())
    statuses = []
    orphans = set()
    for _ in range(5):
        # The shell tells the process id of its child and ends before it does.
        parent = await asyncio.create_subprocess_exec(
            "sh", "-c", "sh -c 'exec 1>&-; sleep 0.2' & echo $!; exit 7", stdout=asyncio.subprocess.PIPE
        )
        output, _ = await parent.communicate()
        orphans.add(int(output))
        statuses.append(parent.returncode)
    async with asyncio.timeout(30):
        while any(os.path.exists(f"/proc/{pid}") for pid in orphans):
            await asyncio.sleep(0.01)
    assert zombie_children() == frozenset()
    assert reaping.done() == (sys.argv[1] == "neither")
    reaping.cancel()
    print(statuses)


asyncio.run(main())
"""
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_unshare() -> bool:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.mark.parametrize("way", ["first process", "subreaper", "neither"])
def test_orphans_leave_no_zombies_and_own_children_keep_their_exit_statuses(way: str) -> None:
    if way == "first process" and not can_unshare():
        pytest.skip("this user may not make a PID namespace")
    wrapper = NAMESPACE if way == "first process" else ()
    command = [*wrapper, sys.executable, "-c", SCRIPT, way]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "[7, 7, 7, 7, 7]\n"), ended.stderr
