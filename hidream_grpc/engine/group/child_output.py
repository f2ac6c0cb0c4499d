"""The output of the zygote and its children: the server forwards it to its own stderr.

They do not inherit the operator's pipe: a pipe that nobody reads would block a rank in the middle of a step.
"""

from __future__ import annotations

import asyncio
import os
import sys

_READ_BYTES = 64 * 1024


class ChildOutput:
    """A pipe whose lines are written to this process's stderr, whole, until it is closed.

    Attributes:
        write_end: the file descriptor for the child; close it once the child has its own copy.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._unfinished_line = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read_end, self._forward)

    def close(self) -> None:
        """Forward what is left in the pipe and close it; may be called twice."""
        while self._read_end >= 0 and self._forward():
            pass
        self._end()

    def _forward(self) -> bool:
        """Forward what is in the pipe now; return whether there was anything."""
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
