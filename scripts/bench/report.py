"""How a benchmark reports: one JSON line on standard output, progress on standard error."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime

import torch

from hidream_grpc.devices.device import open_device

Value = str | int | float | None


def report(
    figure: str, *, device_type: str = "cpu", **values: Value | list[dict[str, Value]] | dict[str, Value]
) -> None:
    """Print what was measured, on what, and when."""
    machine = {
        "device": open_device(device_type, 0).name,
        "num_cores": os.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps({"figure": figure, **values, "machine": machine}))


def say(text: str) -> None:
    """Print how far the benchmark is."""
    print(text, file=sys.stderr, flush=True)


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least so many percent of all do not exceed."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]
