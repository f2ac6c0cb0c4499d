"""A clock whose time a test lets pass at once, instead of a deadline that a busy machine may miss."""

from __future__ import annotations

from hidream_grpc.jobs.store.clock import boot_seconds


class PassingClock:
    """Seconds since boot, and those that the test lets pass."""

    def __init__(self) -> None:
        self._passed_seconds = 0.0

    def __call__(self) -> float:
        return boot_seconds() + self._passed_seconds

    def let_pass(self, seconds: float) -> None:
        self._passed_seconds += seconds
