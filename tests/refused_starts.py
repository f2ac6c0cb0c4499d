"""Servers that cannot start, and what they say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

EXIT_STARTUP_ERROR = 2
TIMEOUT_SECONDS = 60


def refused_line(flags: Sequence[str | Path], environment: dict[str, str] | None = None) -> str:
    """Start a server that cannot start: the one line that it says, and nothing else."""
    with tempfile.TemporaryDirectory() as data_home:
        ended = subprocess.run(
            [sys.executable, "-m", "hidream_grpc", "serve", *flags],
            env={**os.environ, "XDG_DATA_HOME": data_home, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    assert ended.returncode == EXIT_STARTUP_ERROR, ended.stderr
    assert ended.stdout == ""
    # One line and no more: no traceback, and no "the engine is starting", so no zygote and no model.
    (line,) = ended.stderr.splitlines()
    assert line.startswith("hidream-grpc: ")
    return line
