"""Removing a job that has ended, with all that belongs to it."""

from __future__ import annotations

import contextlib

from hidream_grpc.errors import JobNotEndedError, JobNotFoundError
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.store.store import SqlJobStore


async def remove_job(store: SqlJobStore, artifacts: ArtifactStore, owner: str | None, job_id: str) -> None:
    """Remove the files, then the row: whoever is killed between the two leaves nothing behind for ever.

    Raises:
        JobNotFoundError: no such job, or it is another's.
        JobNotEndedError: it is queued or running.
    """
    job = await store.get(owner, job_id)
    if not job.state.has_ended:
        raise JobNotEndedError(job_id)
    await artifacts.remove(job_id)
    await store.delete(owner, job_id)


async def remove_old_job(store: SqlJobStore, artifacts: ArtifactStore, job_id: str) -> None:
    """As `remove_job`, of anybody; nothing happens when another replica was faster."""
    with contextlib.suppress(JobNotFoundError):
        await remove_job(store, artifacts, None, job_id)
