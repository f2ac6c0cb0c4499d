"""A page of shared memory in which a rank counts the collectives that it enters and leaves.

A rank in a collective cannot answer the server, so the server reads there whether it waits for other ranks.
Both map one file, so counting costs no system call.
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
    """How many collectives a rank has entered and left."""

    num_entered: int
    num_left: int

    @property
    def is_waiting(self) -> bool:
        """Whether the rank is in a collective."""
        return self.num_entered > self.num_left


class CollectiveCounterReader:
    """The server's end of a counter.

    Args:
        folder: where the file is made; only this user may enter it.

    Attributes:
        path: path of the file, for the rank.
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
        """The current counts of the rank."""
        return CollectiveCounts(*_COUNTERS.unpack(self._page[: _COUNTERS.size]))

    def forget_file(self) -> None:
        """Remove the file; a rank that has mapped it can go on counting."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmap the page, after which nothing can be read; may be called twice."""
        self._page.close()


class CollectiveCounterWriter:
    """The rank's end of a counter.

    Args:
        path: path of the reader's file.
    """

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            page = mmap.mmap(file.fileno(), _COUNTERS.size)
        self._counters = memoryview(page).cast("Q")

    def __call__(self, is_waiting: bool) -> None:
        """Count a collective that the rank enters (True) or leaves (False)."""
        self._counters[0 if is_waiting else 1] += 1
