"""What nobody asks for: late jobs are stopped, old ones removed with their images."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from hidream_grpc.background import Outage
from hidream_grpc.errors import HiDreamError, JobNotFoundError
from hidream_grpc.jobs.job import CancelReason
from hidream_grpc.jobs.pauses import wait_at_most
from hidream_grpc.jobs.retention import Retention
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

LATE_LOOK_SECONDS = 1.0
SWEEP_SECONDS = 10.0
MIN_SWEEP_SECONDS = 0.5
"""Between two sweeps, however many jobs end."""
LATE_SECONDS = 0.01


class Housekeeping:
    """Looks at deadlines and at what has ended, again and again."""

    def __init__(self, store: SqlJobStore, retention: Retention) -> None:
        self._store = store
        self._retention = retention
        self._has_late = asyncio.Event()
        self._has_ended = asyncio.Event()

    def expect_late_job(self, seconds: float) -> None:
        """Look for late jobs after a time, too."""
        asyncio.get_running_loop().call_later(seconds + LATE_SECONDS, self._has_late.set)

    def note_end(self) -> None:
        """Note that a job has ended, so that there may be too many."""
        self._has_ended.set()

    async def run(self) -> None:
        """Keep house until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._stop_late_jobs_forever())
            tasks.create_task(self._sweep_forever())

    async def _stop_late_jobs_forever(self) -> None:
        outage = Outage(logger, "stop late jobs")
        while True:
            self._has_late.clear()
            try:
                for job_id in await self._store.overdue():
                    await self._cancel(job_id)
                outage.note_success()
            except HiDreamError as error:
                outage.note_failure(error)
            await wait_at_most(self._has_late, LATE_LOOK_SECONDS)

    async def _cancel(self, job_id: str) -> None:
        # It may be stopped by another replica, and removed.
        with contextlib.suppress(JobNotFoundError):
            await self._store.request_cancel(None, job_id, CancelReason.DEADLINE)

    async def _sweep_forever(self) -> None:
        outage = Outage(logger, "remove old jobs")
        while True:
            self._has_ended.clear()
            try:
                await self._retention.sweep(time.time())
                outage.note_success()
            except HiDreamError as error:
                outage.note_failure(error)
            await asyncio.sleep(MIN_SWEEP_SECONDS)
            await wait_at_most(self._has_ended, SWEEP_SECONDS)
