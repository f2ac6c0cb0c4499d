"""How many jobs wait and run, for metrics and GetServerInfo."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter

from hidream_grpc.background import Outage
from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 0.5
"""Between two counts, however much changes."""


class JobCounts:
    """The jobs of the store by state, as last counted."""

    def __init__(self, store: SqlJobStore) -> None:
        self._store = store
        self._by_state: Counter[JobState] = Counter()

    def __getitem__(self, state: JobState) -> int:
        return self._by_state[state]

    async def refresh(self) -> None:
        """Count anew; while the store does not answer, the old numbers stay."""
        # The log says it already: the counting that never ends fails, too.
        with contextlib.suppress(HiDreamError):
            self._by_state = await self._store.counts()

    async def run(self) -> None:
        """Count whenever something has changed, until cancelled."""
        outage = Outage(logger, "count jobs")
        with self._store.subscribe() as changes:
            while True:
                changes.skip()
                try:
                    self._by_state = await self._store.counts()
                    outage.note_success()
                except HiDreamError as error:
                    outage.note_failure(error)
                else:
                    await anext(changes)
                await asyncio.sleep(PAUSE_SECONDS)
