"""Finds processes that a signal has stopped, whatever they were at."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn

from hidream_grpc.background import keep_doing
from hidream_grpc.engine.group.hang_detection import StopWatch
from hidream_grpc.engine.group.proc_stat import LOOK_SECONDS, look_at


async def watch_for_stops(
    pids: Callable[[], Iterable[int]], on_stopped: Callable[[frozenset[int]], Awaitable[None]]
) -> NoReturn:
    """Look at processes until cancelled, through any failure to look.

    Args:
        pids: gives the processes to look at.
        on_stopped: called with those that were stopped at two looks in a row.
    """
    watch = StopWatch()

    async def look() -> None:
        looks = {pid: look_at(pid) for pid in pids()}
        await on_stopped(
            watch.look(frozenset(pid for pid, look in looks.items() if look and look.is_stopped))
        )

    await keep_doing("look for stopped processes", look, lambda: asyncio.sleep(LOOK_SECONDS))
