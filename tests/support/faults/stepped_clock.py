"""The wall clock of a server process, which a test steps while the server runs.

`STEPPED_CLOCK` names a file of eight bytes: how many seconds the clock is ahead, as a double. The clock is
`time.time` and the `julianday('now')` of SQLite; `time.monotonic` is not touched. gRPC measures the deadlines
of calls against the machine's clock in C, so its Python half keeps that clock, too.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

CLOCK_VARIABLE = "STEPPED_CLOCK"
JULIAN_EPOCH = 2440587.5
SECONDS_PER_DAY = 86400.0
GRPC_MODULE = "grpc._cython.cygrpc"

machine_time: Callable[[], float] = time.time


def install() -> None:
    """Have this process read the clock of the test, if it is a server."""
    path = os.environ.get(CLOCK_VARIABLE)
    if path is None or "serve" not in sys.orig_argv:
        return
    with open(path, "rb") as file:  # noqa: PTH123  (before anything is imported)
        ahead = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)

    def stepped_time() -> float:
        return machine_time() + struct.unpack("d", ahead[:8])[0]

    time.time = stepped_time
    _step_sqlite(stepped_time)
    sys.meta_path.insert(0, _GrpcKeepsItsClock())


def _step_sqlite(stepped_time: Callable[[], float]) -> None:
    connect = sqlite3.connect

    def julianday(text: str) -> float:
        assert text == "now"
        return stepped_time() / SECONDS_PER_DAY + JULIAN_EPOCH

    def connect_with_clock(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.create_function("julianday", 1, julianday)
        return connection

    sqlite3.connect = connect_with_clock  # type: ignore[assignment]


class _GrpcKeepsItsClock(MetaPathFinder):
    """Gives gRPC's extension module the clock that its core reads."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != GRPC_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_replace(module: ModuleType) -> None:
            run(module)
            module.time = SimpleNamespace(time=machine_time)  # type: ignore[attr-defined]

        spec.loader.exec_module = run_and_replace  # type: ignore[method-assign]
        return spec
