"""Runs out when a store has refused us, or said nothing, for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

NUM_TICKS = 10
"""The parts that an outage is measured in: a pause of this process counts as one of them at most."""


class OutageTimer:
    """Measures one outage at a time. Belongs to the event loop's thread.

    Args:
        max_outage_seconds: how long an outage may last.
        on_end: called when one has lasted for longer.
    """

    def __init__(self, max_outage_seconds: float, on_end: Callable[[], None]) -> None:
        self._tick_seconds = max_outage_seconds / NUM_TICKS
        self._on_end = on_end
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Measure from now on; nothing happens while it measures already, or has run out."""
        if self._handle is None:
            self._wait_for_tick(NUM_TICKS)

    def stop(self) -> None:
        """Note that the outage is over, if there was one."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _wait_for_tick(self, num_ticks: int) -> None:
        self._handle = asyncio.get_running_loop().call_later(self._tick_seconds, self._tick, num_ticks - 1)

    def _tick(self, num_ticks: int) -> None:
        if num_ticks:
            self._wait_for_tick(num_ticks)
        else:
            self._on_end()
