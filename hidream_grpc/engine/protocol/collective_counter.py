"""A page of memory in which a rank says that it waits for the others.

A rank in a collective cannot answer, and is not to blame for it. It counts the collectives that it enters
and leaves, in a file that both sides map; that costs it no system call.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hidream_grpc.engine.group.folder import PAGE_PREFIX

_COUNTERS = struct.Struct("=QQ")  # collectives entered, collectives left


@dataclass(frozen=True, slots=True)
class CollectiveCounts:
    """What a rank has counted."""

    num_entered: int
    num_left: int

    @property
    def is_waiting(self) -> bool:
        """Whether it is in a collective."""
        return self.num_entered > self.num_left


class CollectiveCounterReader:
    """The server's end.

    Args:
        folder: where the file is made; only this user may enter it.
    """

    def __init__(self, folder: Path) -> None:
        descriptor, path = tempfile.mkstemp(prefix=PAGE_PREFIX, dir=folder)
        self.path = Path(path)
        try:
            os.ftruncate(descriptor, _COUNTERS.size)
            self._page = mmap.mmap(descriptor, _COUNTERS.size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def read(self) -> CollectiveCounts:
        """What the rank has counted up to now."""
        return CollectiveCounts(*_COUNTERS.unpack(self._page[: _COUNTERS.size]))

    def forget_file(self) -> None:
        """Remove the file; a rank that has mapped it goes on counting."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the page back; nothing can be read any more. May be called twice."""
        self._page.close()


class CollectiveCounterWriter:
    """The rank's end.

    Args:
        path: of the reader's file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            page = mmap.mmap(file.fileno(), _COUNTERS.size)
        self._counters = memoryview(page).cast("Q")

    def __call__(self, is_waiting: bool) -> None:
        """Count a collective that is entered, or one that is left."""
        self._counters[0 if is_waiting else 1] += 1
