"""A folder of images that is not there for a while, as an unmounted network disk is not."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2


class ArtifactFolder:
    """The folder that all replicas keep images in.

    While it is away a file has its name, so that no server makes the folder anew: the two swap names.

    Args:
        path: of the folder, which a server has made by the time that it fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._away = path.with_name(path.name + ".away")
        self._away.touch()

    def fail(self) -> None:
        """Take it away, until `heal`."""
        if self.path.is_dir():
            _exchange(self.path, self._away)

    def heal(self) -> None:
        """Bring it back as it was."""
        if self._away.is_dir():
            _exchange(self.path, self._away)

    def files(self) -> list[str]:
        """Every file in it, relative to it."""
        return sorted(str(each.relative_to(self.path)) for each in self.path.rglob("*") if each.is_file())


def _exchange(one: Path, other: Path) -> None:
    """Swap two names; without a moment in which either is missing, which Python's own calls cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(one))
