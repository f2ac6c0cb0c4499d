"""Each benchmark is one command that measures and prints one JSON line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TIMEOUT_SECONDS = 240


@pytest.mark.parametrize(
    ("benchmark", "flags", "figure"),
    [
        ("estimates", ("--refreshes", "2"), "estimates"),
        pytest.param(
            "overhead",
            ("--side", "64", "--rounds", "1", "--steps", "2"),
            "service_cost",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "concurrency",
            ("--side", "64", "--rounds", "1", "--steps", "2", "--callers", "1,3"),
            "concurrency",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "first_progress",
            ("--side", "64", "--rounds", "2", "--busy", "2"),
            "first_progress",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "bridge",
            ("--rounds", "1", "--requests", "80", "--readers", "5"),
            "bridge_cost",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "busy_day",
            (
                *("--waiting", "40", "--watchers", "4", "--running", "2"),
                "--submits",
                "3",
                "--rest-seconds",
                "0.1",
            ),
            "busy_day",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "weights",
            ("--captions", "1", "--side-pixels", "64", "--shapes", "64x64x2", "--rounds", "1"),
            "weights",
            marks=pytest.mark.long,
        ),
        pytest.param("recovery", ("--side", "64", "--rounds", "1"), "recovery", marks=pytest.mark.long),
    ],
)
def test_a_benchmark_prints_one_json_line(benchmark: str, flags: tuple[str, ...], figure: str) -> None:
    command = [sys.executable, "-m", f"scripts.bench.{benchmark}", *flags]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_SECONDS)
    (line,) = finished.stdout.splitlines()
    measured = json.loads(line)
    assert measured["figure"] == figure
    assert measured["machine"]["device"]
    ratios = (
        [measured["ratio"]]
        if "ratio" in measured
        else [of_number["throughput_ratio"] for of_number in measured["callers"]]
    )
    assert all(ratio > 0 for ratio in ratios)
