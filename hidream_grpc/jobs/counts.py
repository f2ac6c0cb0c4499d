"""How many jobs wait and run, for metrics and GetServerInfo."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store.changes import ROW_KINDS
from hidream_grpc.jobs.store.store import SqlJobStore

PAUSE_SECONDS = 0.5
"""Seconds between two counts, however much changes."""


class JobCounts:
    """Numbers of jobs in the store that have not ended, by state, as last counted."""

    def __init__(self, store: SqlJobStore) -> None:
        self._store = store
        self._by_state: Counter[JobState] = Counter()

    def __getitem__(self, state: JobState) -> int:
        return self._by_state[state]

    async def refresh(self) -> None:
        """Count anew; while the store does not answer, the old numbers stay."""
        # `run` logs the same failure.
        with contextlib.suppress(HiDreamError):
            self._by_state = await self._store.counts()

    async def run(self) -> None:
        """Count whenever something has changed, until cancelled."""
        with self._store.subscribe(ROW_KINDS) as changes:

            async def count() -> None:
                changes.take_pending()
                self._by_state = await self._store.counts()

            async def wait_for_changes() -> None:
                await asyncio.sleep(PAUSE_SECONDS)
                await changes.wait()

            await keep_doing("count jobs", count, wait_for_changes)
