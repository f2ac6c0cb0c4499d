"""One clock for all that a store keeps: the database's where replicas share one."""

from __future__ import annotations

import time
from collections.abc import Callable

MAX_SAMPLE_SECONDS = 1.0
"""A sample that took longer says too little: this process may have stood still meanwhile."""


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
        self._first_followed_start: float | None = None

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._start + self._elapsed_seconds()

    def cautious_now(self) -> float:
        """Now, and never later than by the time that has passed here since a database first told its own.

        What is too old or too late is judged by it: a database's clock that steps ahead ends nothing early.
        """
        start = self._start
        if self._first_followed_start is not None:
            start = min(start, self._first_followed_start)
        return start + self._elapsed_seconds()

    def elapsed_seconds(self) -> float:
        """What `follow` is told the moments of a sample in."""
        return self._elapsed_seconds()

    def follow(self, epoch_seconds: float, asked_at: float) -> None:
        """Take over the time that a database told.

        Args:
            epoch_seconds: what it told.
            asked_at: `elapsed_seconds` when it was asked; it has answered just now.
        """
        answered_at = self._elapsed_seconds()
        if answered_at - asked_at <= MAX_SAMPLE_SECONDS:
            self._start = epoch_seconds - (asked_at + answered_at) / 2
            if self._first_followed_start is None:
                self._first_followed_start = self._start
