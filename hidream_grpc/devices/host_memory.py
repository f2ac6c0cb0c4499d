"""Memory that processes of this host may take, in a container as on a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hidream_grpc.devices.device_types import DeviceMemory


@dataclass(frozen=True, slots=True)
class _Controller:
    """The files in which a version of the kernel's control groups says what a group may use, and uses.

    Attributes:
        folders: where its hierarchy may be mounted, below /sys/fs/cgroup.
        limit, used: files of a group, in bytes.
        caches: lines of its memory.stat that count file pages, which give way.
    """

    folders: tuple[str, ...]
    limit: str
    used: str
    caches: tuple[str, ...]


_V1 = _Controller(
    ("memory",),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Controller(("", "unified"), "memory.max", "memory.current", ("inactive_file", "active_file"))


def host_memory(root: Path = Path("/")) -> DeviceMemory:
    """Total and available memory, now, within the limits of every control group of this process.

    Args:
        root: where /proc and /sys are mounted.
    """
    fields = colon_separated(root / "proc/meminfo")
    total_bytes, free_bytes = (_kibibytes(fields[name]) for name in ("MemTotal", "MemAvailable"))
    for limit_bytes, group_free_bytes in _group_limits(root):
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = min(free_bytes, group_free_bytes)
    return DeviceMemory(total_bytes=total_bytes, free_bytes=max(0, free_bytes))


def colon_separated(path: Path) -> dict[str, str]:
    """The lines `name: value` of a file of the kernel, by name; the last one of each name."""
    lines = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit, and what is left of it, of this process's group and of each above it, in bytes."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        controller = _V2 if not controllers else _V1
        if controller is _V1 and "memory" not in controllers.split(","):
            continue
        group = PurePosixPath(name.lstrip("/"))
        for mount in (root / "sys/fs/cgroup" / folder for folder in controller.folders):
            # A container may see its own group as the root, whatever the name says.
            for folder in (mount / group, *(mount / parent for parent in group.parents)):
                yield from _limit_of(folder, controller)


def _limit_of(folder: Path, controller: _Controller) -> Iterator[tuple[int, int]]:
    try:
        limit = (folder / controller.limit).read_text(encoding="ascii").strip()
        used_bytes = int((folder / controller.used).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    if limit == "max":
        return
    counts = dict(line.split() for line in stat)
    cache_bytes = sum(int(counts.get(name, 0)) for name in controller.caches)
    yield int(limit), int(limit) - used_bytes + cache_bytes


def _kibibytes(value: str) -> int:
    return int(value.removesuffix(" kB")) * 1024
