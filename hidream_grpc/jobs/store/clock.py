"""The clock of everything that a store keeps: the database's where replicas share one."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_SAMPLE_SECONDS = 1.0
"""A sample that took longer is dropped: this process may have stood still meanwhile."""

MAX_SLEW = 0.01
"""How much of a step ahead each second adds to `cautious_now`."""
MAX_CAUTION_SECONDS = 86_400.0
"""`cautious_now` is never further behind: nothing is kept for longer than a day anyway."""


def boot_seconds() -> float:
    """Seconds since the machine's start, those that it slept included; never goes back."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class StoreClock:
    """Seconds since the epoch that no step of this machine's clock changes.

    It starts at this machine's time, and goes on by the time since boot. Where there is a database that
    replicas share, `follow` sets it to the time of that database.
    """

    def __init__(self, elapsed_seconds: Callable[[], float] = boot_seconds) -> None:
        self._elapsed_seconds = elapsed_seconds
        self._start = time.time() - elapsed_seconds()
        self._cautious_start: float | None = None
        self._followed_at = 0.0

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._start + self._elapsed_seconds()

    def cautious_now(self) -> float:
        """Now, except that a step ahead of the database's clock is followed slowly.

        Ages and deadlines are measured by it: a clock that steps ahead by hours ends nothing early. A
        deadline without a caller may be late by the step, which is better than too early.
        """
        start = self._start if self._cautious_start is None else self._cautious_start
        return start + self._elapsed_seconds()

    def elapsed_seconds(self) -> float:
        """Seconds on the clock that `follow` takes the moments of a sample in."""
        return self._elapsed_seconds()

    def follow(self, epoch_seconds: float, asked_at: float) -> None:
        """Take over the time that a database gave.

        Args:
            epoch_seconds: the time that it gave.
            asked_at: `elapsed_seconds` when it was asked; it has answered just now.
        """
        answered_at = self._elapsed_seconds()
        if answered_at - asked_at > MAX_SAMPLE_SECONDS:
            return
        start = self._start = epoch_seconds - (asked_at + answered_at) / 2
        if self._cautious_start is None:
            self._cautious_start = start
        else:
            slewed = self._cautious_start + MAX_SLEW * (answered_at - self._followed_at)
            self._cautious_start = min(start, max(slewed, start - MAX_CAUTION_SECONDS))
        self._followed_at = answered_at
