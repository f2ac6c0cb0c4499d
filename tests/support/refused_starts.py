"""Servers that cannot start, and what they say."""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from hidream_grpc.cli import run_command
from hidream_grpc.log_streams import drain_streams

EXIT_STARTUP_ERROR = 2
TIMEOUT_SECONDS = 60


def refused_line(
    flags: Sequence[str | Path],
    environment: dict[str, str] | None = None,
    *,
    with_rights_of_modes: bool = False,
) -> str:
    """Start a server that cannot start: the one line that it says, and nothing else.

    Args:
        with_rights_of_modes: root too may do no more with a file than its mode says.
    """
    prefix: tuple[str, ...] = ()
    if with_rights_of_modes and os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root cannot give its rights up here")
        prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    with tempfile.TemporaryDirectory() as data_home:
        ended = subprocess.run(
            [*prefix, sys.executable, "-m", "hidream_grpc", "serve", *flags],
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


def refused_line_here(flags: Sequence[str | Path], exit_code: int = EXIT_STARTUP_ERROR) -> str:
    """Do as `refused_line` does, in this process: much faster; the environment is the test's own."""
    root = logging.getLogger()
    handlers, level, argv = list(root.handlers), root.level, sys.argv
    root.handlers.clear()
    sys.argv = ["hidream-grpc", "serve", *map(str, flags)]
    output, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            run_command()
    finally:
        # As at the end of a process: a thread writes the log file.
        drain_streams()
        for handler in root.handlers:
            handler.close()
        root.handlers[:], sys.argv = handlers, argv
        root.setLevel(level)
        logging.captureWarnings(False)
    assert ended.value.code == exit_code, errors.getvalue()
    assert output.getvalue() == ""
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("hidream-grpc: ")
    return line
