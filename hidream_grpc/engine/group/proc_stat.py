"""What /proc says of a process."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_INTERVAL_SECONDS = 1.0
"""Time between two samples of a process by the watchdog; a sample takes some hundred microseconds."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# Fields of /proc/<pid>/stat, counted from the one after the name: proc_pid_stat(5).
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """The state of a process at one moment.

    Attributes:
        is_stopped: whether a signal or a debugger has stopped the process.
        is_runnable: whether one of its threads runs, or would if it had a core or its data from the disk.
        cpu_seconds: CPU time that all its threads have used.
    """

    is_stopped: bool
    is_runnable: bool
    cpu_seconds: float


def sample_process(pid: int) -> ProcessSample | None:
    """Read the state of a process; None when it is gone.

    Raises:
        OSError: the system has no free file descriptor now.
    """
    process = Path("/proc") / str(pid)
    try:
        fields = _stat_fields(process)
        threads = list((process / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return None
    states = set()
    for thread in threads:
        with suppress(FileNotFoundError, ProcessLookupError):
            states.add(_stat_fields(thread)[_STATE])
    return ProcessSample(
        is_stopped=fields[_STATE] in {"T", "t"},
        is_runnable=bool(states & {"R", "D"}),
        cpu_seconds=(int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / _TICKS_PER_SECOND,
    )


def zombie_children() -> frozenset[int]:
    """The children of this process that have ended and were not waited for.

    Raises:
        OSError: this kernel does not list children, or the system has no free file descriptor now.
    """
    pids: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        try:
            children = (thread / "children").read_text(encoding="ascii").split()
        except (FileNotFoundError, ProcessLookupError):
            if thread.name == str(os.getpid()):
                raise
            # This thread has ended.
            continue
        pids.update(pid for pid in map(int, children) if _is_zombie_child(pid))
    return frozenset(pids)


def _is_zombie_child(pid: int) -> bool:
    # /proc may be mounted so that it hides the processes of other users.
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _stat_fields(folder: Path) -> list[str]:
    # The name, in parentheses, may contain any character.
    return (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
