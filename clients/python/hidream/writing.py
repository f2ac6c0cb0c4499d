"""Writing files: whole or not at all, and never in place of what is no regular file."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one rename, so that no reader sees half of it; an older one is replaced.

    Links are followed. A device or a pipe is written to.

    Raises:
        OSError: the folder is missing or full, or may not be written to.
    """
    target = followed(path)
    if not is_replaceable(target):
        append(target, data)
        return
    # Beside the target: a rename is atomic only within one file system.
    unfinished = target.with_name(f".hidream-{secrets.token_hex(4)}.part")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def followed(path: Path) -> Path:
    """Return the file that a path means: where its links lead, which need not exist.

    Raises:
        OSError: the links lead in a circle.
    """
    while path.is_symlink() and not _is_descriptor(path):
        with suppress(FileNotFoundError):
            path.stat()
        path = path.parent / path.readlink()
    return path


def is_replaceable(path: Path) -> bool:
    """Whether a path that was followed is a regular file or nothing yet, and no descriptor."""
    return not _is_descriptor(path) and (path.is_file() or not path.exists())


def own_descriptor(path: Path) -> int | None:
    """Return the descriptor of this process that a followed path means, as /dev/fd/1 does; None if none."""
    is_own = _is_descriptor(path) and path.parent.resolve() == Path(f"/proc/{os.getpid()}/fd")
    return int(path.name) if is_own else None


def append(path: Path, data: bytes) -> None:
    """Write to what is there and cannot be replaced, such as a device or a pipe.

    Args:
        path: was followed.
        data: comes behind what a file that is open has.

    Raises:
        OSError: it may not be written to.
    """
    descriptor = own_descriptor(path)
    # A socket cannot be opened by its path.
    opened = os.open(path, os.O_WRONLY | os.O_APPEND) if descriptor is None else os.dup(descriptor)
    with os.fdopen(opened, "wb") as file:
        file.write(data)


def _is_descriptor(path: Path) -> bool:
    """Whether a path is a link of /proc to what a process has open, as /dev/stderr leads to one."""
    return path.is_symlink() and path.parent.resolve().is_relative_to("/proc")
