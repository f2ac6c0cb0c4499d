"""The small files that an operator writes and replaces while the server runs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hidream_grpc.errors import ConfigurationError

Version = tuple[int, int, int]


def version_of(path: Path) -> Version | None:
    """Facts of a file that differ once it was written anew or replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_operator_file(flag: str, path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        ConfigurationError: names the flag and the file, and says why it cannot be read.
    """
    try:
        # A pipe would keep the thread waiting for a writer.
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigurationError(flag, f"{path}: is no regular file")
            return file.read()
    except OSError as error:
        raise ConfigurationError(flag, f"{path}: {error.strerror}") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
