"""Parent and child processes on Linux: how they end together, and why a child ended."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import re
import signal
from pathlib import Path

from hidream_grpc.background import RETRY_SECONDS, Outage
from hidream_grpc.errors import LossCause

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# One for the whole process: every rank's counter is read from the same file.
_oom_outage = Outage(logger, "count the processes that the kernel killed for their memory")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel SIGKILL this process when its parent dies; exit at once if the parent is dead already.

    The signal comes when the parent's *thread* that started this process ends, so a parent starts
    its children from its main thread. A fork clears the setting, an exec keeps it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error_number = ctypes.get_errno()
        raise OSError(error_number, os.strerror(error_number))
    if os.getppid() != parent_pid:
        os._exit(1)


def leave_signals_to_the_server() -> None:
    """Ignore SIGINT and SIGTERM, which may be sent to all processes: the server decides which ends when."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def num_threads() -> int:
    """Number of threads of this process, native ones included."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(r"^Threads:\s+(\d+)$", status, re.MULTILINE)
    if match is None:
        raise OSError("/proc/self/status has no line Threads")
    return int(match.group(1))


def describe_exit(exit_code: int) -> str:
    """How a process ended, in words; a negative code is minus the number of the signal that killed it."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


class OomKills:
    """Detects whether the kernel has killed a process of this machine for want of memory since `note`."""

    def __init__(self) -> None:
        self._num_seen: int | None = None
        self.note()

    def note(self) -> None:
        """Note how many such kills there were so far."""
        if (num_kills := _num_oom_kills()) is not None:
            self._num_seen = num_kills

    @property
    def has_new(self) -> bool:
        """Whether there was another kill since `note`."""
        num_kills = _num_oom_kills()
        return num_kills is not None and self._num_seen is not None and num_kills > self._num_seen


def _num_oom_kills() -> int | None:
    """Number of such kills since the system started; None when it cannot be read now."""
    try:
        counters = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError as error:
        # A death that is examined meanwhile counts as one from outside.
        _oom_outage.note_failure(error)
        return None
    _oom_outage.note_success()
    match = re.search(r"^oom_kill (\d+)$", counters, re.MULTILINE)
    # Kernels before 4.13 have no such counter.
    return int(match[1]) if match else 0


def cause_of_exit(exit_code: int, oom_kills: OomKills) -> LossCause:
    """What ended a process: SIGKILL comes from outside or for want of memory, all else from its work."""
    if exit_code != -signal.SIGKILL:
        return LossCause.FAULT
    return LossCause.OUT_OF_MEMORY if oom_kills.has_new else LossCause.OUTSIDE


async def wait_until_gone(pid: int) -> None:
    """Wait for the end of a process that need not be a child of this one."""
    if (pidfd := await _open_pidfd(pid)) is None:
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


async def _open_pidfd(pid: int) -> int | None:
    """Open a pidfd, waiting for a free file descriptor if necessary; None when the process is gone."""
    outage = Outage(logger, f"wait for the end of process {pid}")
    while True:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        except OSError as error:
            outage.note_failure(error)
            await asyncio.sleep(RETRY_SECONDS)
        else:
            outage.note_success()
            return pidfd
