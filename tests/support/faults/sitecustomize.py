"""Faults of rank processes, from outside: a Python that finds this on its path imports it when it starts.

SIGUSR1 has a process loop for ever, SIGUSR2 wait for ever for what never comes. A device of the CPU whose
number is the name of a file in the folder `BROKEN_DEVICES` cannot be opened, or has no memory where the file
says so.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

DEVICE_MODULE = "hidream_grpc.devices.cpu"


def loop(_number: int, _frame: object) -> None:
    while True:
        pass


def wait(_number: int, _frame: object) -> None:
    threading.Event().wait()


class BreakableDevices(MetaPathFinder):
    """Gives the module of the CPU devices another `open_device`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != DEVICE_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_replace(module: ModuleType) -> None:
            run(module)
            open_device = module.open_device

            def open_unless_broken(local_index: int) -> object:
                fault = Path(os.environ["BROKEN_DEVICES"]) / str(local_index)
                if fault.exists() and fault.read_text() == "memory":
                    raise MemoryError("no memory for a buffer")
                if fault.exists():
                    raise RuntimeError(f"device {local_index} has fallen off the bus")
                return open_device(local_index)

            module.open_device = open_unless_broken  # type: ignore[attr-defined]

        spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec


signal.signal(signal.SIGUSR1, loop)
signal.signal(signal.SIGUSR2, wait)
if "BROKEN_DEVICES" in os.environ:
    sys.meta_path.insert(0, BreakableDevices())
if "STEPPED_CLOCK" in os.environ:
    # This folder is on the path, since Python has found this file.
    import stepped_clock  # type: ignore[import-not-found]

    stepped_clock.install()
