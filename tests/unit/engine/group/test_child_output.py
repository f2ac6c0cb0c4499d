from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from hidream_grpc.engine.group.child_output import ChildOutput

TIMEOUT_SECONDS = 20.0


@pytest.fixture
async def output() -> AsyncIterator[ChildOutput]:
    output = ChildOutput()
    yield output
    output.close()
    os.close(output.write_end)


async def passed_on(capsys: pytest.CaptureFixture[str], ends_with: str) -> str:
    """Wait until stderr ends with a text; return all of it."""
    text = ""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not text.endswith(ends_with):
            await asyncio.sleep(0)
            text += capsys.readouterr().err
    return text


async def test_whole_lines_come_out_as_they_are_written(
    output: ChildOutput, capsys: pytest.CaptureFixture[str]
) -> None:
    os.write(output.write_end, "红".encode()[:1])
    os.write(output.write_end, "红".encode()[1:] + b"\nhalf of ")
    assert await passed_on(capsys, "\n") == "红\n"
    os.write(output.write_end, b"a line\n\xff\n")
    assert await passed_on(capsys, "\\xff\n") == "half of a line\n\\xff\n"


async def test_more_than_a_pipe_holds_gets_through(
    output: ChildOutput, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"".join(b"%d\n" % number for number in range(100_000))

    def write() -> None:
        unwritten = lines
        while unwritten:
            unwritten = unwritten[os.write(output.write_end, unwritten) :]

    writing = asyncio.create_task(asyncio.to_thread(write))
    assert await passed_on(capsys, "\n99999\n") == lines.decode()
    await writing


async def test_the_last_words_of_a_process_come_out_at_the_end(
    output: ChildOutput, capsys: pytest.CaptureFixture[str]
) -> None:
    os.write(output.write_end, b"terminate called")
    output.close()
    output.close()
    assert capsys.readouterr().err == "terminate called\n"
