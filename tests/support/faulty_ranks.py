"""Ranks that hang, and devices that cannot be opened: see `tests/support/faults/sitecustomize.py`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hidream_grpc.engine.group.rank_group import RankGroup
from tests.support.rank_groups import until, zygote_pid_of

LOOP = signal.SIGUSR1
WAIT_FOR_EVER = signal.SIGUSR2


class Devices:
    """Devices of the CPU that can be broken: new processes cannot open them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def break_(self, *numbers: int) -> None:
        for number in numbers:
            (self._folder / str(number)).touch()

    def take_memory_of(self, *numbers: int) -> None:
        for number in numbers:
            (self._folder / str(number)).write_text("memory")

    def repair_all(self) -> None:
        for path in self._folder.iterdir():
            path.unlink()


@contextmanager
def faults(folder: Path) -> Iterator[Devices]:
    """Have all Python processes that start inside obey the signals, and find devices broken.

    Args:
        folder: empty.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent / "faults"), prepend=os.pathsep)
        environment.setenv("BROKEN_DEVICES", str(folder))
        yield Devices(folder)


def send(group: RankGroup, number: signal.Signals, *ranks: int) -> None:
    for pid in [group.rank_pids[rank] for rank in ranks]:
        os.kill(pid, number)


async def until_busy(pid: int) -> None:
    """Wait until a process computes."""
    process = psutil.Process(pid)
    before = process.cpu_times().user
    await until(lambda: process.cpu_times().user > before, f"process {pid} computes")


def children_of_zygote(group: RankGroup) -> set[int]:
    return {child.pid for child in psutil.Process(zygote_pid_of(group)).children()}
