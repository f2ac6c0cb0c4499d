from __future__ import annotations

from pathlib import Path

import pytest

from hidream_grpc.devices.host_memory import host_memory

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GiB of which 48 are available."""
    write(
        tmp_path / "proc/meminfo",
        f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {48 * 2**20} kB\n",
    )
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def limit_v2(folder: Path, limit: object, used: int, cache: int = 0) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 5\ninactive_file {cache}\nactive_file 0")


def gibibytes(root: Path) -> tuple[float, float]:
    memory = host_memory(root)
    return memory.total_bytes / GIB, memory.free_bytes / GIB


def test_a_machine_without_control_groups_has_what_the_kernel_says(root: Path) -> None:
    assert gibibytes(root) == (64, 48)


def test_the_tightest_group_above_the_process_counts_and_its_file_pages_give_way(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pod/container")
    limit_v2(root / "sys/fs/cgroup/pod/container", "max", used=30 * GIB)
    limit_v2(root / "sys/fs/cgroup/pod", 32 * GIB, used=30 * GIB, cache=10 * GIB)
    assert gibibytes(root) == (32, 12)


def test_a_container_that_sees_its_group_as_the_root_is_limited_too(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/../elsewhere")
    limit_v2(root / "sys/fs/cgroup", 8 * GIB, used=GIB)
    assert gibibytes(root) == (8, 7)


def test_control_groups_of_the_first_version_limit_too(root: Path) -> None:
    write(root / "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/docker/1\n0::/")
    folder = root / "sys/fs/cgroup/memory/docker/1"
    write(folder / "memory.limit_in_bytes", 16 * GIB)
    write(folder / "memory.usage_in_bytes", 4 * GIB)
    write(folder / "memory.stat", f"total_inactive_file {GIB}\ntotal_active_file {GIB}")
    assert gibibytes(root) == (16, 14)


def test_a_limit_beyond_the_machine_changes_nothing_and_one_that_is_used_up_leaves_nothing(
    root: Path,
) -> None:
    write(root / "proc/self/cgroup", "0::/a")
    limit_v2(root / "sys/fs/cgroup/a", 2**63 - 4096, used=GIB)
    assert gibibytes(root) == (64, 48)
    limit_v2(root / "sys/fs/cgroup/a", 2 * GIB, used=3 * GIB)
    assert gibibytes(root) == (2, 0)
