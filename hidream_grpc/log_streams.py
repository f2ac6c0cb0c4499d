"""Streams that never block what writes to them: a pipe that nobody reads, a file system that hangs.

A thread of its own writes what a stream was given. What it cannot get rid of is held up to a limit; beyond
that lines are dropped and counted, and the log says how many when it flows again.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import select
import stat
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

MAX_HELD_BYTES = 256 * 1024
"""About 2000 lines: more than a reader that lives falls behind by."""
DRAIN_SECONDS = 1.0
"""How long the end of the process waits for what is held to be written."""

_writers: list[DroppingWriter] = []


class DroppingWriter(io.RawIOBase):
    """Writes to a file descriptor, later.

    What is held when the process is killed is lost; before every other end `drain_streams` waits for it.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        """Write to a descriptor from now on.

        Args:
            descriptor: of a pipe, a terminal or a file, for as long as the process lives.
            name: what the log calls it, as in "3 lines for stderr were dropped".
        """
        super().__init__()
        self._descriptor = descriptor
        self._name = name
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._num_dropped_lines = 0
        self._is_failing = False
        self._is_telling = False
        self._changed = threading.Condition()
        threading.Thread(target=self._write_for_ever, name=f"writing {name}", daemon=True).start()
        _writers.append(self)

    def _before_write(self) -> None:
        """Do what is to be done in the thread before each write."""

    def writable(self) -> bool:
        """Say that lines are taken, as they always are."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Take lines, all or none of them, and return at once."""
        with self._changed:
            if self._held_bytes + len(data) > MAX_HELD_BYTES:
                self._num_dropped_lines += data.count(b"\n")
            else:
                self._held.append(bytes(data))
                self._held_bytes += len(data)
                self._changed.notify_all()
        return len(data)

    def drain(self, deadline: float) -> None:
        """Wait until nothing is held nor to be told, or until the time (of the monotonic clock) has come."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._held_bytes and not self._is_telling, max(0.0, deadline - time.monotonic())
            )

    def _write_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held)
                lines = self._held.popleft()
            num_lost_lines = self._write_now(lines)
            with self._changed:
                self._held_bytes -= len(lines)
                self._num_dropped_lines += num_lost_lines
                # Told when there is room for it.
                num_to_tell = 0 if self._held or num_lost_lines else self._num_dropped_lines
                self._num_dropped_lines -= num_to_tell
                self._is_telling = num_to_tell > 0
                self._changed.notify_all()
            if num_to_tell:
                logger.warning(
                    "%d lines for %s were dropped: it took none for a while", num_to_tell, self._name
                )
                with self._changed:
                    self._is_telling = False
                    self._changed.notify_all()

    def _write_now(self, lines: bytes) -> int:
        """Write all of it, however long that takes; the number of lines that could not be written."""
        unwritten = memoryview(lines)
        self._before_write()
        while unwritten:
            try:
                unwritten = unwritten[os.write(self._descriptor, unwritten) :]
            except BlockingIOError:
                # Another process that shares the pipe has made it so.
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll()
            except OSError as error:
                if not self._is_failing:
                    self._is_failing = True
                    logger.warning(
                        "cannot write to %s: %s; its lines are dropped", self._name, error.strerror
                    )
                return bytes(unwritten).count(b"\n")
        self._is_failing = False
        return 0


class DroppingFileWriter(DroppingWriter):
    """Appends to a file, later; where it was moved away or removed, to a new one of its name."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it.

        Raises:
            OSError: it cannot be opened.
        """
        self._path = path
        super().__init__(_opened(path), str(path))

    def _before_write(self) -> None:
        try:
            if os.path.samestat(self._path.stat(), os.fstat(self._descriptor)):
                return
        except FileNotFoundError:
            pass
        except OSError:
            return
        # Where no new one can be made the old one takes the lines.
        with contextlib.suppress(OSError):
            new = _opened(self._path)
            os.dup2(new, self._descriptor, inheritable=False)
            os.close(new)


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)


def dropping_stream(descriptor: int, name: str) -> TextIO:
    """A text stream in front of a descriptor; see `DroppingWriter`."""
    return _text_stream(DroppingWriter(descriptor, name))


def dropping_file_stream(path: Path) -> TextIO:
    """A text stream that appends to a file; see `DroppingFileWriter`."""
    return _text_stream(DroppingFileWriter(path))


def _text_stream(writer: DroppingWriter) -> TextIO:
    if len(_writers) == 1:
        atexit.register(drain_streams)
    return io.TextIOWrapper(writer, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[type-var]


def drain_streams() -> None:
    """Wait until all streams of this process have written what they hold, but not for one that is stuck."""
    deadline = time.monotonic() + DRAIN_SECONDS
    # Twice, since what the last one has to tell is a line for those before it.
    for writer in _writers * 2:
        writer.drain(deadline)


def protect_stderr() -> None:
    """Have nothing in this process wait for what reads its stderr.

    A library's own code does not either where stderr is a pipe or a terminal; where it is a socket or a file,
    what such code writes goes there directly.
    """
    _open_missing_descriptors()
    sys.stderr = dropping_stream(os.dup(2), "stderr")
    if stat.S_ISFIFO(os.fstat(2).st_mode) or os.isatty(2):
        # A library's own code writes to descriptor 2. Opened anew the pipe or terminal has flags that no
        # other process shares: what finds it full is refused there, and does not wait. A socket cannot be
        # opened anew.
        try:
            own_end = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return
        os.dup2(own_end, 2)
        os.close(own_end)


def _open_missing_descriptors() -> None:
    # Else the next file that is opened, such as the database, would get what libraries write to stderr.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
