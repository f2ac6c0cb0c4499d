"""Folders that hold jobs and images: make them, or say why they cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def make_writable(folder: Path) -> None:
    """Make a folder, unless it is there already.

    Raises:
        OSError: the folder cannot be made or written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code), str(folder))
