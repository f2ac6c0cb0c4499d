"""Waits for processes whose parents have ended: the first process of a container gets them as children.

Such a child stays a zombie until it is waited for. Ranks of a zygote that was killed become children that
way, and processes that `docker exec` or a compiler leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os

from hidream_grpc.background import keep_doing
from hidream_grpc.engine.group.proc_stat import SAMPLE_INTERVAL_SECONDS, zombie_children

_PR_GET_CHILD_SUBREAPER = 37  # linux/prctl.h


def adopts_orphans() -> bool:
    """Whether this process gets children that it did not start."""
    if os.getpid() == 1:
        return True
    is_subreaper = ctypes.c_int()
    libc = ctypes.CDLL(None)
    return libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_subreaper)) == 0 and bool(is_subreaper.value)


async def reap_adopted_children() -> None:
    """Wait for adopted children until cancelled; return at once where there can be none.

    A child that this process started is waited for by the code that started it, within moments of its end. So
    a zombie that is in two samples in a row is an adopted one, and no code here needs its exit status.
    """
    if not adopts_orphans():
        return
    seen: frozenset[int] = frozenset()

    async def sample() -> None:
        nonlocal seen
        zombies = zombie_children()
        for pid in zombies & seen:
            _reap(pid)
        seen = zombies

    await keep_doing(
        "reap processes whose parents have ended", sample, lambda: asyncio.sleep(SAMPLE_INTERVAL_SECONDS)
    )


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
