"""The folder of a rank group for its socket and its pages of shared memory.

A server that is killed leaves its folder behind. A running server holds a lock on the folder itself, which
the kernel releases however the server ends, so the next server knows which folders it may remove. It removes
only folders with the marker of a server, and in them only files that a server makes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

SOCKET_NAME = "ranks"
PAGE_PREFIX = "collectives-"

# Short, since the path of a socket must be.
_PREFIX = "hidream."
_MARKER = ".of-hidream-grpc"
# What tempfile appends to a prefix.
_RANDOM = "[a-z0-9_]{8}"
_FOLDER_NAME = re.compile(re.escape(_PREFIX) + _RANDOM)
_OWN_FILE_NAME = re.compile(f"{SOCKET_NAME}|{re.escape(PAGE_PREFIX)}{_RANDOM}|{re.escape(_MARKER)}")
_LONGEST_PATH_IN_IT = f"/{_PREFIX}{'x' * 8}/{SOCKET_NAME}"
_MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its final zero


def has_room_for_socket_path(temporary_folder: Path) -> bool:
    """Whether the path of a socket in a `GroupFolder` there is short enough for the kernel."""
    return len(bytes(temporary_folder)) + len(_LONGEST_PATH_IN_IT) <= _MAX_SOCKET_PATH_BYTES


class GroupFolder:
    """A folder that only this user may enter (mode 0700); it exists until `remove`.

    Attributes:
        path: path of the folder.
    """

    def __init__(self) -> None:
        """Make the folder, and remove those that killed servers of this user left behind.

        Raises:
            OSError: there is no folder for temporary files, or it cannot be written to.
        """
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._descriptor = _open_own(self.path)
        try:
            # The marker comes after the lock, so that a sweep which sees it finds the folder locked. Without
            # a lock, as on some file systems, there is no marker, and the folder is never swept.
            if _lock(self._descriptor):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                os.close(os.open(_MARKER, flags, 0o600, dir_fd=self._descriptor))
        except OSError:
            os.close(self._descriptor)
            with suppress(OSError):
                self.path.rmdir()
            raise

    def remove(self) -> None:
        """Remove the folder and what servers make in it; log why where that fails. It may be gone already."""
        try:
            _remove(self.path, self._descriptor)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("cannot remove %s: %s", self.path, error.strerror)
        finally:
            os.close(self._descriptor)


def _lock(descriptor: int) -> bool:
    """Lock a folder; return False where another process holds the lock, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _open_own(folder: Path) -> int:
    """Open a folder of this user; raise OSError where the path is no such folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove the folders that killed servers of this user left in `parent`."""
    for folder in parent.glob(f"{_PREFIX}*"):
        if not _FOLDER_NAME.fullmatch(folder.name):
            continue
        try:
            descriptor = _open_own(folder)
        except OSError:
            continue
        try:
            if _has_marker(descriptor) and _lock(descriptor):
                _remove(folder, descriptor)
                logger.info("removed %s of a server that was killed", folder)
        except FileNotFoundError:
            # Another server has removed it first.
            pass
        except OSError as error:
            logger.warning("cannot remove %s of a server that was killed: %s", folder, error.strerror)
        finally:
            os.close(descriptor)


def _has_marker(descriptor: int) -> bool:
    try:
        marker = os.stat(_MARKER, dir_fd=descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(marker.st_mode) and marker.st_uid == os.geteuid()


def _remove(folder: Path, descriptor: int) -> None:
    """Remove a folder of files that servers make; raises OSError, and removes nothing, if it holds others."""
    names = os.listdir(descriptor)
    for name in names:
        is_folder = stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode)
        if is_folder or not _OWN_FILE_NAME.fullmatch(name):
            raise OSError(errno.ENOTEMPTY, "it holds what no server has made")
    # The marker goes last, so that a folder that was removed in part is removed at the next start.
    for name in sorted(names, key=lambda name: name == _MARKER):
        os.unlink(name, dir_fd=descriptor)
    folder.rmdir()
