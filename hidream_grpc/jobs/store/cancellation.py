"""Stops jobs: because a call asks for it, or because the last caller that waited has gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.changes import Change, ChangeKind, row_changed
from hidream_grpc.jobs.store.reading import readable, row_of
from hidream_grpc.jobs.store.records import AttachedCall


class JobCancellation(StoreBase):
    """Calls that stop a job, or may do so."""

    @uninterrupted
    async def request_cancel(self, owner: str | None, job_id: str, reason: CancelReason) -> Job:
        """End a job that no replica has, or have its replica end it; one that has ended stays as it is.

        Returns:
            The job as it is then; one that runs has its `cancel_reason` set.

        Raises:
            JobNotFoundError: no such job, or it is another's.
        """
        async with self._database.write() as connection:
            row = await row_of(connection, owner, job_id, for_update=True)
            job, changes = await self._cancel(connection, row, reason)
        self._committed(changes, job)
        return job

    @uninterrupted
    async def detach(self, job_id: str, call: AttachedCall, reason: CancelReason | None) -> Job | None:
        """Note that a caller waits no more; with a reason the job is cancelled if it was the last.

        Returns:
            The job where it was cancelled, as `request_cancel` does.

        Raises:
            JobNotFoundError: no such job.
        """
        async with self._database.write() as connection:
            row = await row_of(connection, None, job_id, for_update=True)
            is_last = await _note_left(connection, row.acceptance_number, call)
            if not is_last or reason is None:
                return None
            job, changes = await self._cancel(connection, row, reason)
        self._committed(changes, job)
        return job

    @uninterrupted
    async def forget_call(self, call_id: str) -> None:
        """Note that a caller waits no more for its job, if it did; nothing is cancelled."""
        async with self._database.write() as connection:
            await connection.execute(queries.detach(call_id))

    async def _cancel(
        self, connection: AsyncConnection, row: Row[Any], reason: CancelReason
    ) -> tuple[Job, Sequence[Change]]:
        """End a job whose row is locked, or have its replica end it."""
        job = readable(row)
        if job.state.has_ended:
            return job, ()
        if row.is_unclaimed:
            job = job.cancelled_unclaimed(job.cancel_reason or reason, self.clock.now())
            await connection.execute(queries.write_ended_unclaimed(row.acceptance_number, job))
            change = row_changed(job)
        else:
            job = replace(job, cancel_reason=job.cancel_reason or reason)
            await connection.execute(queries.ask_to_cancel(row.acceptance_number, reason.value))
            change = Change(ChangeKind.CANCEL_REQUESTED, job.job_id)
        await self._notify(connection, [change])
        return job, (change,)


async def _note_left(connection: AsyncConnection, acceptance_number: int, call: AttachedCall) -> bool:
    """Note that a caller waits no more; return whether it was the last one that waited."""
    await connection.execute(queries.detach(call.call_id))
    return (await connection.execute(queries.num_attached(acceptance_number))).scalar_one() == 0
