"""Nothing that reads, or does not read, what a server says can stop it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc
from tests.support.live_server import STOP_TIMEOUT_SECONDS, wait_until, wait_until_serving
from tests.support.streams import follow, request

PIPE_BYTES = 4096
NUM_CALLS = 700
"""Their lines are more than the pipe and the server hold."""
CALL_SECONDS = 60.0

_LISTENING = re.compile(r"listening on ([0-9.]+:\d+)")


@contextmanager
def server_with_stderr(stderr: int | None, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that logs to a file and to this descriptor (None: it is closed), and its address."""
    log_file = folder / "server.log"
    command = [
        *(sys.executable, "-m", "hidream_grpc", "serve", "--listen", "127.0.0.1:0", "--devices", "0"),
        *("--data-dir", str(folder / "data"), "--log-file", str(log_file), "--log-level", "DEBUG"),
        *("--log-format", "json"),
    ]
    closing = () if stderr is not None else ("sh", "-c", 'exec "$@" 2>&- >&- <&-', "sh")
    environment = {**os.environ, "HIDREAM_STROE": "of whoever cannot type"}
    process = subprocess.Popen([*closing, *command], stderr=stderr, env=environment)
    try:
        wait_until(lambda: log_file.is_file() and "listening on" in log_file.read_text(), 60, "it listens")
        match = _LISTENING.search(log_file.read_text(encoding="utf-8"))
        assert match is not None
        yield process, match[1]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def small_pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    try:
        yield read_end, write_end
    finally:
        os.close(read_end)
        os.close(write_end)


def draw(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = image_gen_pb2_grpc.ImageGenStub(channel)
        assert follow(stub.Generate(request(num_inference_steps=1), timeout=CALL_SECONDS)).images


def call_often(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = image_gen_pb2_grpc.ImageGenStub(channel)
        for _ in range(NUM_CALLS):
            # It needs no store, and is logged as any other.
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                stub.GetJob(image_gen_pb2.GetJobRequest(), timeout=CALL_SECONDS)


def end(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(STOP_TIMEOUT_SECONDS)


def messages(lines: str) -> list[str]:
    return [json.loads(line)["message"] for line in lines.splitlines()]


def test_a_server_whose_stderr_nobody_reads_draws_ends_and_tells_what_it_dropped(
    small_pipe: tuple[int, int], tmp_path: Path
) -> None:
    read_end, write_end = small_pipe
    log_file = tmp_path / "server.log"
    heard = b""

    def has_told() -> bool:
        nonlocal heard
        heard += os.read(read_end, PIPE_BYTES)
        return b"were dropped" in heard and heard.endswith(b"\n")

    with server_with_stderr(write_end, tmp_path) as (process, address):
        wait_until_serving(address)
        call_often(address)
        draw(address)
        wait_until(has_told, 60, "the server tells what was dropped")
        call_often(address)
        assert end(process) == 0
    in_file = messages(log_file.read_text(encoding="utf-8"))
    assert in_file.count("GetJob INVALID_ARGUMENT") == 2 * NUM_CALLS
    assert "stopped" in in_file
    # Nothing of the first half was lost uncounted: each of its lines came, or is in the number.
    *came, told = messages(heard.decode())
    match = re.fullmatch(r"(\d+) lines for stderr were dropped: it took none for a while", told)
    assert match is not None
    # (A line that another thread logs at the same moment may stand on either side of it.)
    assert abs(len(came) + int(match[1]) - in_file.index(told)) < 10


@pytest.mark.long
def test_a_server_without_a_stderr_answers_and_ends_in_order(tmp_path: Path) -> None:
    with server_with_stderr(None, tmp_path) as (process, address):
        call_often(address)
        # Nothing else got the number of the descriptor that was closed.
        assert all(
            Path(f"/proc/{process.pid}/fd/{number}").readlink() == Path(os.devnull) for number in (0, 1, 2)
        )
        assert end(process) == 0
    logged = messages((tmp_path / "server.log").read_text(encoding="utf-8"))
    assert "stopped" in logged
    assert logged[0] == "no settings, and ignored: HIDREAM_STROE (did you mean HIDREAM_STORE?)"
