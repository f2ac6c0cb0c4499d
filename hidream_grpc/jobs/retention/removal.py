"""Removing a job that has ended, with all that belongs to it."""

from __future__ import annotations

from hidream_grpc.errors import JobNotEndedError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.store.store import SqlJobStore


async def remove_job(store: SqlJobStore, artifacts: ArtifactStore, owner: str | None, job_id: str) -> None:
    """Remove the files, then the row: whatever is killed between the two leaves nothing behind for ever.

    Raises:
        JobNotFoundError: no such job, or it is another's.
        JobNotEndedError: it is queued or running.
    """
    job = await store.get(owner, job_id)
    if not job.state.has_ended:
        raise JobNotEndedError(job_id)
    await artifacts.remove(job_id)
    await store.delete(owner, job_id)
