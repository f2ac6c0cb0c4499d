"""Work that no caller asks for: stop late jobs, remove old ones, and files that no job names."""

from __future__ import annotations

import asyncio
import contextlib

from hidream_grpc.background import keep_doing
from hidream_grpc.errors import JobInternalError, JobNotFoundError
from hidream_grpc.jobs.artifacts.orphans import OrphanedFiles
from hidream_grpc.jobs.job import CancelReason
from hidream_grpc.jobs.retention.retention import Retention
from hidream_grpc.jobs.retrying import wait_at_most
from hidream_grpc.jobs.store.store import SqlJobStore

LATE_LOOK_SECONDS = 1.0
SWEEP_SECONDS = 10.0
MIN_SWEEP_SECONDS = 0.5
"""Seconds between two sweeps, however many jobs end."""
LATE_SECONDS = 0.01


class Housekeeping:
    """Looks at deadlines, at jobs that have ended, and at files, again and again.

    Args:
        orphan_sweep_seconds: seconds between two looks at all files.
    """

    def __init__(
        self,
        store: SqlJobStore,
        retention: Retention,
        orphans: OrphanedFiles,
        orphan_sweep_seconds: float,
    ) -> None:
        self._store = store
        self._retention = retention
        self._orphans = orphans
        self._orphan_sweep_seconds = orphan_sweep_seconds
        self._has_late = asyncio.Event()
        self._has_ended = asyncio.Event()

    def expect_late_job(self, seconds: float) -> None:
        """Look for late jobs once more after this time."""
        asyncio.get_running_loop().call_later(seconds + LATE_SECONDS, self._has_late.set)

    def note_end(self) -> None:
        """Note that a job has ended, so that too many may be kept."""
        self._has_ended.set()

    async def run(self) -> None:
        """Keep house until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keep_doing("stop late jobs", self._stop_late_jobs, self._pause_between_looks))
            tasks.create_task(keep_doing("remove old jobs", self._sweep, self._pause_between_sweeps))
            tasks.create_task(
                keep_doing("remove files without a job", self._orphans.sweep, self._pause_between_orphans)
            )

    async def _stop_late_jobs(self) -> None:
        self._has_late.clear()
        for job_id in await self._store.overdue():
            # Another replica may have stopped and removed it, or its row cannot be read.
            with contextlib.suppress(JobNotFoundError, JobInternalError):
                await self._store.request_cancel(None, job_id, CancelReason.DEADLINE)

    async def _sweep(self) -> None:
        self._has_ended.clear()
        await self._retention.sweep(self._store.clock.cautious_now())

    async def _pause_between_looks(self) -> None:
        await wait_at_most(self._has_late, LATE_LOOK_SECONDS)

    async def _pause_between_sweeps(self) -> None:
        await asyncio.sleep(MIN_SWEEP_SECONDS)
        await wait_at_most(self._has_ended, SWEEP_SECONDS)

    async def _pause_between_orphans(self) -> None:
        await asyncio.sleep(self._orphan_sweep_seconds)
