from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx

from tests.support.live_bridge import running_bridge
from tests.support.live_server import LiveServer

START_TIMEOUT_SECONDS = 60


def test_the_bridge_is_ready_when_its_server_is(http: httpx.Client) -> None:
    assert http.get("/healthz").status_code == 200
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "SERVING"})


def test_without_its_server_the_bridge_lives_and_is_not_ready() -> None:
    with running_bridge("127.0.0.1:1") as bridge, bridge.client() as http:
        assert http.get("/healthz").status_code == 200
        ready = http.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"status": "UNAVAILABLE"})


def test_an_unknown_path_is_a_problem_in_json(http: httpx.Client) -> None:
    refused = http.get("/v1/nothing")
    assert refused.status_code == 404
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["title"] == "Not Found"


def test_the_command_serves_and_ends_with_sigterm(server: LiveServer) -> None:
    command = [sys.executable, "-m", "hidream_http", "--server", server.address, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            listening = next(line for line in process.stderr if "listening on" in line)
            match = re.search(r"http://\S+:\d+", listening)
            assert match is not None
            assert httpx.get(f"{match[0]}/readyz", trust_env=False).status_code == 200
            process.send_signal(signal.SIGTERM)
            process.stderr.read()
            assert process.wait(START_TIMEOUT_SECONDS) == 0
        finally:
            process.kill()


def test_wrong_flags_are_one_line_and_exit_code_2(server: LiveServer) -> None:
    port = server.address.rpartition(":")[2]
    for flags, begin in (
        (("--listen", "8080"), "hidream-http: --listen: '8080' is not HOST:PORT"),
        (("--listen", f"127.0.0.1:{port}"), f"hidream-http: --listen: 127.0.0.1:{port} is in use"),
        (("--server", "http://a/b"), "hidream-http: --server: address 'http://a/b'"),
        (("--sevrer", "a"), "hidream-http: No such option: --sevrer"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "hidream_http", *flags],
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_SECONDS,
        )
        assert ended.returncode == 2, ended.stderr
        (line,) = ended.stderr.splitlines()
        assert line.startswith(begin)
