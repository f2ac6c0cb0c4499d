"""What the zygote and its children write to stdout and stderr: the server passes it on.

They have no pipe of the operator's: one that nobody reads would stop a rank in the middle of a step.
"""

from __future__ import annotations

import asyncio
import os
import sys

_READ_BYTES = 64 * 1024


class ChildOutput:
    """A pipe whose lines come out at this process's stderr, whole, until it is closed.

    Attributes:
        write_end: for the child; close it when the child has its own copy.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._unfinished_line = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read_end, self._pass_on)

    def close(self) -> None:
        """Pass on what is left; may be called twice."""
        while self._read_end >= 0 and self._pass_on():
            pass
        self._end()

    def _pass_on(self) -> bool:
        """Pass on what has come; whether there was anything."""
        try:
            data = os.read(self._read_end, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._end()
            return False
        lines, newline, rest = (self._unfinished_line + data).rpartition(b"\n")
        if len(rest) > _READ_BYTES:
            lines, newline, rest = lines + newline + rest, b"\n", b""
        self._unfinished_line = rest
        _write(lines + newline)
        return True

    def _end(self) -> None:
        if self._read_end < 0:
            return
        self._loop.remove_reader(self._read_end)
        os.close(self._read_end)
        self._read_end = -1
        if self._unfinished_line:
            _write(self._unfinished_line + b"\n")


def _write(lines: bytes) -> None:
    sys.stderr.write(lines.decode("utf-8", "backslashreplace"))
    sys.stderr.flush()
