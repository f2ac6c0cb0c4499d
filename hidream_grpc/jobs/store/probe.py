"""Finds out whether the job store would accept a job now, from real calls and from probes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.outage_timer import OutageTimer
from hidream_grpc.jobs.store.failures import has_no_free_connection
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
"""Seconds between two probes; half of it while something is in doubt."""
_PROBE = SqlJobStore.probe.__name__
_WATCHED = frozenset({SqlJobStore.add.__name__, SqlJobStore.claim.__name__, _PROBE})


class StoreProbe:
    """Notes when the store has refused for too long to accept jobs, or to have them claimed.

    A call that was refused is in doubt until the same call succeeds, or until a probe succeeds that began
    after a whole round without such a refusal. While nothing is in doubt, any success shows that the store
    works.

    Attributes:
        is_usable: False once an outage has lasted too long, until nothing is in doubt.

    Args:
        replica_id: gives the id of this replica as it is registered now.
        max_outage_seconds: for so long callers do better to wait than to go elsewhere.
        on_change: called when `is_usable` has changed.
    """

    def __init__(
        self,
        store: SqlJobStore,
        replica_id: Callable[[], str],
        max_outage_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        self.is_usable = True
        self._store = store
        self._replica_id = replica_id
        self._max_outage_seconds = max_outage_seconds
        self._on_change = on_change
        # Runs while something is in doubt or a probe has no answer: a database that hangs says nothing.
        self._timer = OutageTimer(max_outage_seconds, self._note_outage)
        self._is_asking = False
        self._round = 0
        # The round in which each was refused last.
        self._refused: dict[str, int] = {}

    async def run(self) -> None:
        """Probe the store now and then until cancelled."""
        self._store.observe_call = self.note_call
        try:
            await keep_doing("use the job store", self._probe, self._pause)
        finally:
            self._timer.stop()

    def note_call(self, name: str, error: StoreUnavailableError | StoreFullError | None) -> None:
        """Note how a call to the store ended, by the name of its method.

        A store without room still reads, and removes old jobs: it is usable. That all connections are in use
        says nothing about the store.
        """
        if name not in _WATCHED or (error is not None and has_no_free_connection(error)):
            return
        if name == _PROBE:
            self._is_asking = False
        if isinstance(error, StoreUnavailableError):
            self._refused[name] = self._round
            self._timer.start()
            return
        self._refused.pop(name, None)
        if name == _PROBE:
            self._refused = {name: last for name, last in self._refused.items() if last >= self._round - 1}
        if not self._refused:
            self._note_success()

    async def _probe(self) -> None:
        self._round += 1
        self._is_asking = True
        self._timer.start()
        with contextlib.suppress(StoreFullError):
            await self._store.probe(self._replica_id(), is_in_doubt=bool(self._refused))

    async def _pause(self) -> None:
        await asyncio.sleep(PROBE_SECONDS / 2 if self._refused else PROBE_SECONDS)

    def _note_success(self) -> None:
        self._timer.stop()
        if self._is_asking:
            self._timer.start()
        if not self.is_usable:
            self.is_usable = True
            logger.info("the job store answers again: health says SERVING where the engine works")
            self._on_change()

    def _note_outage(self) -> None:
        if self.is_usable:
            self.is_usable = False
            logger.warning(
                "the job store has refused what a job needs for %g s: health says NOT_SERVING",
                self._max_outage_seconds,
            )
            self._on_change()
