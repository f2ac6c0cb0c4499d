"""The start script starts the real server with its demo model, and gives way to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.live_server import wait_until_serving
from tests.support.unused_ports import unused_port

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "start_service.sh"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The script, running the demo on one CPU rank from an empty folder."""
    packages = (REPOSITORY, REPOSITORY / "clients" / "python", REPOSITORY / "clients" / "http")
    import_path = os.pathsep.join(map(str, packages))
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    arguments: list[str | Path] = [
        "--demo",
        "-t",
        "cpu",
        "-d",
        "0",
        "-p",
        tmp_path,
        "--host",
        "127.0.0.1",
        "--port",
        str(unused_port()),
        "--http-port",
        "0",
    ]
    process = subprocess.Popen(
        [SCRIPT, *arguments],
        # --demo means the demo, whatever else the environment says.
        env={
            **os.environ,
            "PATH": search_path,
            "PYTHONPATH": import_path,
            "HIDREAM_MODEL_PATH": "/no/model",
            "XDG_DATA_HOME": str(tmp_path / "data"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        yield process
        if process.poll() is None:
            process.kill()


def wait_for_addresses(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Read the terminal until the bridge and the server say where they listen."""
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        output += line
        bridge = re.search(r"start_service: open (http://127\.0\.0\.1:\d+)", output)
        server = re.search(r"listening on (127\.0\.0\.1:\d+)", output)
        if bridge and server:
            return bridge[1], server[1]
    raise AssertionError(f"the server ended: {output}")


@pytest.mark.parametrize(
    "is_ready", [pytest.param(False, id="loading"), pytest.param(True, id="ready", marks=pytest.mark.long)]
)
def test_the_script_becomes_a_server_with_a_bridge_that_logs_to_its_file_and_ends_well_on_sigterm(
    started: subprocess.Popen[str], tmp_path: Path, is_ready: bool
) -> None:
    url, address = wait_for_addresses(started)
    if is_ready:
        wait_until_serving(address)
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    assert httpx.get(f"{url}/v1/server", trust_env=False).json()["model"]["name"]
    started.send_signal(signal.SIGTERM)
    assert started.stdout is not None
    rest_of_terminal = started.stdout.read()  # to its end: the bridge is gone too
    assert started.wait() == 0
    # Where nobody says where, jobs are kept in the user's data folder.
    assert (tmp_path / "data" / "hidream-grpc" / "jobs.sqlite").is_file()
    (log_file,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"hidream_\d{8}_\d{6}\.log", log_file.name)
    log = log_file.read_text(encoding="utf-8")
    assert f"listening on {address}" in log
    assert log.splitlines()[-1] in rest_of_terminal
