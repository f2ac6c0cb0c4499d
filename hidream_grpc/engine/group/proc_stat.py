"""What the kernel tells of a process that does not answer."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SAMPLE_INTERVAL_SECONDS = 1.0
"""How often the watchdog looks at processes; some hundred microseconds each."""

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# Of /proc/<pid>/stat, counted from the field after the name: proc_pid_stat(5).
_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """A process at one moment.

    Attributes:
        is_stopped: by a signal, or by a debugger.
        is_runnable: whether a thread of it runs, or would if it had a core or its data from the disk.
        cpu_seconds: that all its threads have used.
    """

    is_stopped: bool
    is_runnable: bool
    cpu_seconds: float


def sample_process(pid: int) -> ProcessSample | None:
    """Look at a process; None when it is gone.

    Raises:
        OSError: the system has no file descriptor to give just now.
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
        OSError: the kernel does not tell the children of a process, or there is no file descriptor just now.
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
    # Not from /proc, which hides the processes of other users where it is mounted so.
    with suppress(ChildProcessError):
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _stat_fields(folder: Path) -> list[str]:
    # The name, in parentheses, may hold anything.
    return (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
