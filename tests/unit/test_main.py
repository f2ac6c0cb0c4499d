from __future__ import annotations

import importlib.metadata
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hidream_grpc.cli import app

# Sends itself a signal when the first of the server's modules is looked for.
SCRIPT = """
import os, signal, sys
from hidream_grpc.__main__ import main

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "hidream_grpc.cli":
            os.kill(os.getpid(), {number:d})
            os._exit(7)

if {is_ignored}:
    signal.signal({number:d}, signal.SIG_IGN)
sys.meta_path.insert(0, Finder())
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_ignored", [False, True], ids=["default", "ignored"])
def test_a_signal_during_the_imports_ends_the_process_without_a_traceback(
    number: signal.Signals, is_ignored: bool
) -> None:
    script = SCRIPT.format(number=number, is_ignored=is_ignored)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (7 if is_ignored else -number, "")


def test_without_a_command_the_help_is_printed_as_it_is_with_help() -> None:
    def printed(*words: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "hidream_grpc", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr

    code, text, errors = printed("--help")
    assert (code, errors) == (0, "")
    assert "\n  serve  Load the model once" in text
    assert printed() == (2, text, "")


def test_the_version_is_that_of_the_distribution() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    version = importlib.metadata.version("hidream-grpc")
    assert (shown.exit_code, shown.stdout) == (0, f"hidream-grpc {version}\n")
