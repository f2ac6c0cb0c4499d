"""Finds processes that a signal has stopped, whatever they were doing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn

from hidream_grpc.background import keep_doing
from hidream_grpc.engine.group.proc_stat import SAMPLE_INTERVAL_SECONDS, sample_process


class StoppedProcessDetector:
    """Tells processes that stay stopped from those that are stopped for a moment."""

    def __init__(self) -> None:
        self._before: frozenset[int] = frozenset()

    def observe(self, stopped: frozenset[int]) -> frozenset[int]:
        """Note which processes are stopped now; return those that were stopped at the previous call too."""
        still_stopped = stopped & self._before
        self._before = stopped
        return still_stopped


async def watch_for_stops(
    pids: Callable[[], Iterable[int]], on_stopped: Callable[[frozenset[int]], Awaitable[None]]
) -> NoReturn:
    """Sample processes until cancelled; a sample that fails is logged and retried.

    Args:
        pids: returns the processes to sample.
        on_stopped: called with the processes that were stopped in two samples in a row.
    """
    detector = StoppedProcessDetector()

    async def sample_all() -> None:
        samples = {pid: sample_process(pid) for pid in pids()}
        stopped = frozenset(pid for pid, sample in samples.items() if sample and sample.is_stopped)
        await on_stopped(detector.observe(stopped))

    await keep_doing("look for stopped processes", sample_all, lambda: asyncio.sleep(SAMPLE_INTERVAL_SECONDS))
