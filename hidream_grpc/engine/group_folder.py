"""The folder of a rank group for its socket and its pages of shared memory. Torch-free.

A server that is killed leaves its folder. Who lives holds a lock on the folder itself, which the kernel gives
free at any end, so the next server knows whose folder may go.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from enum import Enum, auto
from pathlib import Path

logger = logging.getLogger(__name__)

# Not `hidream-`, as in versions whose folders have no lock; and short, since a socket's path is.
_PREFIX = "hidream."


class GroupFolder:
    """A folder that only this user may enter (mode 0700), there until `remove`.

    Attributes:
        path: of the folder.
    """

    def __init__(self) -> None:
        """Make it, and remove those of this user's servers that were killed.

        Raises:
            OSError: there is no folder for temporary files, or it cannot be written to.
        """
        _sweep(Path(tempfile.gettempdir()))
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            try:
                self._descriptor = _open_own(self.path)
            except FileNotFoundError:
                continue
            # A file system without locks is not swept either.
            is_locked = _lock(self._descriptor) is not _Lock.HELD
            if is_locked and self.path.is_dir():
                return
            # The sweep of another server came before the lock.
            os.close(self._descriptor)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path)
        os.close(self._descriptor)


class _Lock(Enum):
    TAKEN = auto()
    HELD = auto()
    UNSUPPORTED = auto()


def _lock(descriptor: int) -> _Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.HELD
    except OSError:
        return _Lock.UNSUPPORTED
    return _Lock.TAKEN


def _open_own(folder: Path) -> int:
    """A descriptor of a folder of this user; raises OSError when it is none."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return descriptor


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            descriptor = _open_own(folder)
        except OSError:
            continue
        try:
            if _lock(descriptor) is _Lock.TAKEN:
                shutil.rmtree(folder)
                logger.info("removed %s of a server that was killed", folder)
        except OSError as error:
            logger.warning("cannot remove %s of a server that was killed: %s", folder, error.strerror)
        finally:
            os.close(descriptor)
