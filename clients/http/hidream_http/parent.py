"""The end of a process together with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

from hidream_http.settings import SettingError

PARENT_FLAG = "--parent-pid"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends.

    Raises:
        SettingError: the parent is another process, or has ended already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise SettingError(PARENT_FLAG, os.strerror(ctypes.get_errno()))
    # After the call: a parent that ends before it sends nothing.
    if os.getppid() != parent_pid:
        raise SettingError(PARENT_FLAG, f"process {parent_pid} is not the one that started this one")
