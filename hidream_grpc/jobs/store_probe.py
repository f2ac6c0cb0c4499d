"""Whether the job store would accept a job now, found out by asking it for that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import StoreFullError
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

PROBE_SECONDS = 1.0


class StoreProbe:
    """Asks the store every second, and notes when it has refused everything for too long.

    Attributes:
        is_usable: False from the end of such an outage on, until the store has answered once.

    Args:
        max_outage_seconds: what callers are better told to wait for than sent elsewhere.
        on_change: called when `is_usable` has changed.
    """

    def __init__(self, store: SqlJobStore, max_outage_seconds: float, on_change: Callable[[], None]) -> None:
        self.is_usable = True
        self._store = store
        self._max_outage_seconds = max_outage_seconds
        self._on_change = on_change
        # Runs from the first question without an answer on: a database that hangs says nothing.
        self._outage_timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Ask until cancelled."""
        try:
            await keep_doing("use the job store", self._probe, lambda: asyncio.sleep(PROBE_SECONDS))
        finally:
            self._stop_timer()

    async def _probe(self) -> None:
        if self._outage_timer is None:
            loop = asyncio.get_running_loop()
            self._outage_timer = loop.call_later(self._max_outage_seconds, self._note_outage)
        # A store without room answers for all that it has, and removes what is old.
        with contextlib.suppress(StoreFullError):
            await self._store.probe()
        self._stop_timer()
        if not self.is_usable:
            self.is_usable = True
            logger.info("the job store answers again: health says SERVING where the engine works")
            self._on_change()

    def _note_outage(self) -> None:
        if self.is_usable:
            self.is_usable = False
            logger.warning(
                "the job store has refused everything for %g s: health says NOT_SERVING",
                self._max_outage_seconds,
            )
            self._on_change()

    def _stop_timer(self) -> None:
        if self._outage_timer is not None:
            self._outage_timer.cancel()
            self._outage_timer = None
