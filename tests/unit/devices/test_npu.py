"""Runs `npu_cases.py` in a process of its own: torch's private backend is renamed for good there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("npu_cases.py")


def test_an_npu_is_opened_measured_and_waited_for_as_its_rank_needs_it() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", str(CASES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
