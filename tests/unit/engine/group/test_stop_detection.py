"""Processes that are stopped or hang are found, also after a time in which no sample could be taken."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import cast

import pytest

from hidream_grpc.engine.group import plan_execution, proc_stat, stop_detection
from hidream_grpc.engine.group.hang_detection import HangDetector, RankSample
from hidream_grpc.engine.group.plan_execution import watch_ranks
from hidream_grpc.engine.group.proc_stat import sample_process
from hidream_grpc.engine.group.rank_link import RankLink
from hidream_grpc.engine.group.stop_detection import StoppedProcessDetector, watch_for_stops

NUM_FAILURES = 3


@pytest.fixture(autouse=True)
def sampling_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (stop_detection, plan_execution):
        monkeypatch.setattr(module, "SAMPLE_INTERVAL_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def no_file_descriptors_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first samples find no free file descriptor."""
    failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE)) for _ in range(NUM_FAILURES)]
    stat_fields = proc_stat._stat_fields

    def failing(*arguments: object) -> list[str]:
        if failures:
            raise failures.pop()
        return stat_fields(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(proc_stat, "_stat_fields", failing)


@pytest.fixture
async def stopped_process() -> AsyncIterator[int]:
    """A stopped process, which only SIGCONT or SIGKILL reaches."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE
    )
    process.send_signal(signal.SIGSTOP)
    yield process.pid
    process.kill()
    await process.wait()


async def until(found: asyncio.Event, watching: Awaitable[object]) -> None:
    """Run a watch until it has found something."""
    task = asyncio.ensure_future(watching)
    try:
        async with asyncio.timeout(30):
            await found.wait()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_a_process_is_stopped_when_two_samples_in_a_row_say_so() -> None:
    detector = StoppedProcessDetector()
    assert detector.observe(frozenset({1, 2})) == frozenset()
    assert detector.observe(frozenset({2, 3})) == frozenset({2})
    assert detector.observe(frozenset()) == frozenset()
    assert detector.observe(frozenset({2, 3})) == frozenset()


async def test_a_stopped_process_is_found_after_looks_that_failed_and_the_log_says_that_once(
    stopped_process: int, caplog: pytest.LogCaptureFixture
) -> None:
    found = asyncio.Event()

    async def note(stopped: frozenset[int]) -> None:
        if stopped == {stopped_process}:
            found.set()

    await until(found, watch_for_stops(lambda: (stopped_process, os.getpid()), note))
    assert caplog.messages == [
        "cannot look for stopped processes: [Errno 24] Too many open files; trying again"
    ]


class StoppedRank:
    """A rank whose process is stopped in the middle of its work."""

    rank = 0

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.is_killed = asyncio.Event()

    def sample(self) -> RankSample | None:
        process = sample_process(self._pid)
        assert process is not None
        return RankSample(False, 0, process.is_runnable, process.cpu_seconds)

    async def kill_hung(self, _reason: str) -> None:
        self.is_killed.set()


async def test_a_rank_that_hangs_is_found_after_looks_that_failed_and_the_log_says_that_once(
    stopped_process: int, caplog: pytest.LogCaptureFixture
) -> None:
    rank = StoppedRank(stopped_process)
    plan = asyncio.get_running_loop().create_future()
    detector = HangDetector(limit_seconds=0.1, num_threads=1)
    await until(rank.is_killed, watch_ranks({cast(RankLink, rank): plan}, detector))
    assert caplog.messages == [
        "cannot look for ranks that hang: [Errno 24] Too many open files; trying again"
    ]
