"""How long callers wait for their progress to go on after something died."""

from __future__ import annotations

import threading
import time

from hidream.events import Event, Progress, Restarted


class Recoveries:
    """Times from a kill to the next progress of any caller after a restart.

    What befalls the ranks meanwhile belongs to the same recovery. Any thread may call.

    Attributes:
        seconds: of each recovery.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._lock = threading.Lock()
        # By the wall clock, since events carry its time; the server is on this machine.
        self._struck_at: float | None = None
        self._restarted_at: float | None = None

    def struck(self) -> None:
        """Note that something is killed now."""
        with self._lock:
            if self._struck_at is None:
                self._struck_at, self._restarted_at = time.time(), None

    def note(self, event: Event) -> None:
        """Note an event that a caller received."""
        if not isinstance(event, Progress | Restarted):
            return
        at = event.time.timestamp()
        with self._lock:
            if self._struck_at is None or at < self._struck_at:
                return
            if isinstance(event, Restarted):
                self._restarted_at = self._restarted_at or at
            elif self._restarted_at is not None and at >= self._restarted_at:
                self.seconds.append(at - self._struck_at)
                self._struck_at = None
