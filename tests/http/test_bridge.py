from __future__ import annotations

import io
import logging
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr

import httpx
import pytest

from hidream_http.command import main
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


def refused_line(*flags: str) -> str:
    """The one line of a bridge that cannot start."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn.error")
    handlers, levels = list(root.handlers), (root.level, uvicorn.level)
    root.handlers.clear()
    output, argv = io.StringIO(), sys.argv
    sys.argv = ["hidream-http", *flags]
    try:
        with redirect_stderr(output), pytest.raises(SystemExit) as ended:
            main()
    finally:
        root.handlers[:], sys.argv = handlers, argv
        root.setLevel(levels[0])
        uvicorn.setLevel(levels[1])
    assert ended.value.code == 2
    (line,) = output.getvalue().splitlines()
    return line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--listen", "8080"), "--listen: '8080' is not HOST:PORT"),
        (("--listen", "192.0.2.1:80"), "--listen: cannot listen on 192.0.2.1:80"),
        (("--server", "http://a/b", "--listen", "127.0.0.1:0"), "--server: address 'http://a/b'"),
        (("--sevrer", "a"), "No such option: --sevrer"),
        (("--tls-key", "k"), "--tls-key: needs --tls-certificate"),
        (("--tls-client-ca", "k"), "--tls-client-ca: needs --tls-certificate and --tls-key"),
        (("--server-certificate", "c"), "--server-certificate: needs --server-key"),
        (("--server-ca", "/nowhere"), "--server-ca: /nowhere: No such file"),
        (("--server-ca", ""), "--server-ca: is empty"),
        (("--cors-origins", "a.example"), "--cors-origins: 'a.example' is no origin"),
        (("--max-body-bytes", "0"), "Invalid value for '--max-body-bytes': Input should be greater"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(flags: tuple[str, ...], line: str) -> None:
    assert refused_line(*flags).startswith(f"hidream-http: {line}")


def test_an_address_that_is_taken_is_one_line(server: LiveServer) -> None:
    assert refused_line("--listen", server.address) == f"hidream-http: --listen: {server.address} is in use"
