"""Readers that do not read, and many that have nothing to read, cost the bridge little."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack

import psutil
import pytest
from starlette.types import Message

from hidream_http.parts import PartsResponse
from tests.support.job_calls import Stub, submit
from tests.support.live_server import LiveServer

NUM_READERS = 200
MAX_BYTES = 20 * 1024 * 1024
WATCH = b"GET /v1/jobs:watch?labels[test]=idle HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n"


async def test_a_reader_that_does_not_read_is_no_reason_to_ask_for_more() -> None:
    asked = 0
    is_full, has_room = asyncio.Event(), asyncio.Event()

    async def parts() -> AsyncGenerator[bytes]:
        nonlocal asked
        for _ in range(100):
            asked += 1
            yield b"part"

    async def send(message: Message) -> None:
        # As a connection whose buffer is full.
        if message.get("body"):
            is_full.set()
            await has_room.wait()

    async def receive() -> Message:
        return await asyncio.get_running_loop().create_future()

    sending = asyncio.create_task(
        PartsResponse(asyncio.Event(), parts(), {})({"type": "http"}, receive, send)  # type: ignore[arg-type]
    )
    await is_full.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert asked == 1
    has_room.set()
    await sending
    assert asked == 100


@pytest.fixture
def bridge_process(server: LiveServer) -> Iterator[tuple[psutil.Process, int]]:
    """A bridge as a process of its own, and its port."""
    command = [sys.executable, "-m", "hidream_http", "--server", server.address, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            match = re.search(r":(\d+)$", process.stdout.readline())
            assert match is not None
            yield psutil.Process(process.pid), int(match[1])
        finally:
            process.terminate()


@pytest.mark.long
async def test_200_idle_readers_of_events_cost_at_most_20_mb(
    bridge_process: tuple[psutil.Process, int], stub: Stub
) -> None:
    process, port = bridge_process

    async def open_stream() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WATCH)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        return reader, writer

    async with AsyncExitStack() as opened, asyncio.timeout(120):
        # The first brings what every later one shares.
        readers = []
        for _ in range(5):
            reader, writer = await open_stream()
            opened.callback(writer.close)
            readers.append(reader)
        before = process.memory_info().rss
        for reader, writer in await asyncio.gather(*(open_stream() for _ in range(NUM_READERS))):
            opened.callback(writer.close)
            readers.append(reader)
        used_bytes = process.memory_info().rss - before
        # All of them still hear.
        job_id = (await asyncio.to_thread(submit, stub, prompt="a fox", labels={"test": "idle"})).job_id
        for reader in readers:
            await reader.readuntil(job_id.encode())
    assert used_bytes <= MAX_BYTES
