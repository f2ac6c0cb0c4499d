from __future__ import annotations

import errno
import os
import pty
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hidream_grpc import log_streams
from hidream_grpc.log_streams import (
    MAX_HELD_BYTES,
    DroppingWriter,
    dropping_file_stream,
    dropping_stream,
)
from tests.support.live_server import wait_until

LINE = b"x" * 1023 + b"\n"
NUM_HELD = MAX_HELD_BYTES // len(LINE)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    # The write end belongs to a thread that lives as long as the process.
    os.close(read_end)


def test_lines_come_out_in_their_order(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    stream = dropping_stream(write_end, "a pipe")
    stream.write("red\n")
    stream.write("红色 \udcff\n")
    stream.flush()
    expected = "red\n红色 \\udcff\n".encode()
    received = b""
    while len(received) < len(expected):
        received += os.read(read_end, 100)
    assert received == expected


def test_a_file_that_was_moved_away_or_removed_is_begun_anew(tmp_path: Path) -> None:
    file, moved = tmp_path / "server.log", tmp_path / "server.log.1"

    def holds(path: Path, text: str) -> None:
        wait_until(lambda: path.exists() and path.read_text() == text, 10, f"{path.name} holds {text!r}")

    stream = dropping_file_stream(file)
    stream.write("one\n")
    holds(file, "one\n")
    file.rename(moved)
    stream.write("two\n")
    holds(file, "two\n")
    file.unlink()
    stream.write("three\n")
    holds(file, "three\n")
    assert moved.read_text() == "one\n"


def test_what_is_more_than_is_held_is_counted_and_told_when_it_flows_again(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    read_end, write_end = pipe
    writer = DroppingWriter(write_end, "a pipe")
    # Full, so that nothing that the writer takes gets through.
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, b"-" * 512)
    num_lines = NUM_HELD + 7
    for _ in range(num_lines):
        assert writer.write(LINE) == len(LINE)
    received = b""
    while received.count(b"\n") < NUM_HELD:
        received += os.read(read_end, MAX_HELD_BYTES)
    wait_until(lambda: len(caplog.records) > 0, 20, "the dropped lines are told")
    assert [record.getMessage() for record in caplog.records] == [
        "7 lines for a pipe were dropped: it took none for a while"
    ]
    assert received.lstrip(b"-") == LINE * NUM_HELD


def test_that_lines_were_dropped_is_told_before_the_end(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = pipe
    writer = DroppingWriter(write_end, "a pipe")
    told: list[str] = []

    def tell_slowly(message: str, *arguments: object) -> None:
        # Time for a drain that does not wait for this to return.
        time.sleep(0.1)
        told.append(message % arguments)

    monkeypatch.setattr(log_streams.logger, "warning", tell_slowly)
    os.set_blocking(write_end, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(write_end, b"-" * 512)
    for _ in range(NUM_HELD + 2):
        writer.write(LINE)
    received = 0
    while received < NUM_HELD:
        received += os.read(read_end, MAX_HELD_BYTES).count(b"\n")
    writer.drain(time.monotonic() + 20)
    assert told == ["2 lines for a pipe were dropped: it took none for a while"]


def test_a_descriptor_that_takes_nothing_is_told_once_until_it_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as file:
        is_full = threading.Event()
        is_full.set()
        write = os.write

        def write_where_there_is_room(descriptor: int, data: bytes) -> int:
            if descriptor == file.fileno() and is_full.is_set():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data)

        monkeypatch.setattr(os, "write", write_where_there_is_room)
        writer = DroppingWriter(file.fileno(), "the file")
        for _ in range(3):
            writer.write(b"lost\n")
        writer.drain(time.monotonic() + 20)
        is_full.clear()
        writer.write(b"kept\n")
        wait_until(lambda: len(caplog.records) == 2, 20, "the dropped lines are told")
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write to the file: No space left on device; its lines are dropped",
        "3 lines for the file were dropped: it took none for a while",
    ]
    assert (tmp_path / "log").read_bytes() == b"kept\n"


END = """
import os, sys
from hidream_grpc import log_streams
from hidream_grpc.log_streams import drain_streams, protect_stderr
protect_stderr()
for number in range(1000):
    print(number, file=sys.stderr)
{end}
"""


@pytest.mark.parametrize(
    "end", ["sys.exit(3)", "drain_streams(); os._exit(3)"], ids=["of the interpreter", "at once"]
)
def test_every_line_is_out_when_the_process_ends(end: str) -> None:
    ended = subprocess.run([sys.executable, "-c", END.format(end=end)], capture_output=True, text=True)
    assert ended.returncode == 3
    assert ended.stderr == "".join(f"{number}\n" for number in range(1000))


@pytest.mark.parametrize("writing", ["os.write(2, b'n' * 100)", "print('p' * 100, file=sys.stderr)"])
@pytest.mark.parametrize("ends", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_neither_python_nor_native_code_waits_for_a_full_pipe_or_terminal(
    ends: Callable[[], tuple[int, int]], writing: str
) -> None:
    read_end, write_end = ends()
    script = END.format(
        end=f"for _ in range(20_000):\n try: {writing}\n except BlockingIOError: pass\nsys.exit(3)"
    )
    try:
        assert subprocess.run([sys.executable, "-c", script], stderr=write_end, timeout=60).returncode == 3
        # The flags that others share are as they were.
        assert os.get_blocking(write_end)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_python_waits_for_no_full_socket() -> None:
    read_end, write_end = socket.socketpair()
    script = END.format(end="for _ in range(20_000): print('p' * 100, file=sys.stderr)\nsys.exit(3)")
    with read_end, write_end:
        ended = subprocess.run([sys.executable, "-c", script], stderr=write_end.fileno(), timeout=60)
    assert ended.returncode == 3


def test_a_broken_pipe_ends_nothing() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run([sys.executable, "-c", END.format(end="sys.exit(3)")], stderr=write_end)
    os.close(write_end)
    assert ended.returncode == 3
