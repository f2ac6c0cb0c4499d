"""Removes jobs that have ended: one that a caller deletes, or those that retention chooses."""

from __future__ import annotations

from collections.abc import Collection

from hidream_grpc.errors import JobNotEndedError
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store import queries
from hidream_grpc.jobs.store.base import StoreBase, uninterrupted
from hidream_grpc.jobs.store.changes import Change, ChangeKind
from hidream_grpc.jobs.store.reading import row_of
from hidream_grpc.jobs.store.records import EndedJob, Usage
from hidream_grpc.jobs.store.rows import job_of


class JobRemoval(StoreBase):
    """Calls about jobs that have ended, and how much is kept of them."""

    @uninterrupted
    async def delete(self, owner: str | None, job_id: str) -> Job:
        """Remove a job that has ended; its request id is free again.

        Raises:
            JobNotFoundError: there is no such job, or it is another owner's.
            JobNotEndedError: it is queued or running.
        """
        change = Change(ChangeKind.DELETED, job_id)
        async with self._database.write() as connection:
            row = await row_of(connection, owner, job_id, for_update=True)
            job = job_of(row)
            if row.end_time is None:
                raise JobNotEndedError(job_id)
            await connection.execute(queries.delete_ended([job_id]))
            await connection.execute(queries.delete_idle_turns())
            await self._notify(connection, [change])
        self._committed([change])
        return job

    @uninterrupted
    async def delete_ended(self, job_ids: Collection[str]) -> None:
        """Remove those of the jobs that exist and have ended, of all owners."""
        changes: list[Change] = []
        async with self._database.write() as connection:
            for some in queries.batches(job_ids):
                deleted = (await connection.execute(queries.delete_ended(some))).scalars()
                changes += [Change(ChangeKind.DELETED, job_id) for job_id in deleted]
            await connection.execute(queries.delete_idle_turns())
            await self._notify(connection, changes)
        self._committed(changes)

    @uninterrupted
    async def ended(self, after: EndedJob | None = None, limit: int = 100) -> tuple[EndedJob, ...]:
        """Read jobs that have ended, the oldest end first; from behind one of them where it is given."""
        behind = None if after is None else (after.end_time, after.acceptance_number)
        async with self._database.read() as connection:
            rows = await connection.execute(queries.ended(behind, limit))
            return tuple(EndedJob(*row) for row in rows)

    @uninterrupted
    async def usage(self) -> Usage:
        """Sum up how much is kept of jobs that have ended."""
        async with self._database.read() as connection:
            num_ended_jobs, image_bytes = (await connection.execute(queries.usage())).one()
        return Usage(num_ended_jobs, int(image_bytes))
