"""Files that no row names: what a server that was late, or killed, has left in the artifact store."""

from __future__ import annotations

import logging
from collections.abc import Collection

from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore, StoredFile, image_file
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

MAX_FILES_READ = 200
"""How many files are looked at together."""


def is_named(file: StoredFile, job: Job | None) -> bool:
    """Whether a job names a file, or its claim may still do so; its row is read after the file was seen."""
    if job is None:
        # A row is written before its files, so this one was removed.
        return False
    if job.is_unreadable:
        return True
    if not job.state.has_ended and file.claim_number >= job.claim_number:
        return True
    if file.index is None:
        snapshot = job.snapshot
        return not job.state.has_ended and snapshot is not None and snapshot.claim_number == file.claim_number
    return (file.claim_number, file.index) in {(image.claim_number, image.index) for image in job.images}


class OrphanedFiles:
    """Removes the files that no row names, where the artifact store belongs to this job store alone."""

    def __init__(self, store: SqlJobStore, artifacts: ArtifactStore) -> None:
        self._store = store
        self._artifacts = artifacts
        self._is_ours: bool | None = None

    async def sweep(self) -> None:
        """Remove the files that no job names; raises HiDreamError when one of the stores does not answer."""
        if self._is_ours is None:
            self._is_ours = await self._find_out_whose()
            if not self._is_ours:
                logger.warning(
                    "the artifact store belongs to another job store, or to none: files without a job stay; "
                    "to have them removed, write %s into its file store_id and start again",
                    await self._store.store_id(),
                )
        if not self._is_ours:
            return
        num_removed = 0
        async for files in self._artifacts.files(MAX_FILES_READ):
            job_ids = {file.job_id for file in files}
            jobs = {job.job_id: job for job in await self._store.get_all(job_ids)}
            num_removed += await self._remove([f for f in files if not is_named(f, jobs.get(f.job_id))])
        if num_removed:
            logger.info("removed %d files that no job names", num_removed)

    async def remove_lost(self, job: Job) -> None:
        """Remove what a lost claim has written and no row names; takes the job as that claim knew it."""
        newest = {found.job_id: found for found in await self._store.get_all([job.job_id])}
        indexes = range(job.submission.parameters.num_images)
        written = [image_file(job.job_id, job.claim_number, index) for index in indexes]
        await self._remove([file for file in written if not is_named(file, newest.get(job.job_id))])

    async def _find_out_whose(self) -> bool:
        """Whether the files are this job store's: as is written there, or else as all of them say."""
        own_id = await self._store.store_id()
        if await self._artifacts.store_id() is None:
            if not await self._are_all_known_here():
                return False
            await self._artifacts.set_store_id(own_id)
        return await self._artifacts.store_id() == own_id

    async def _are_all_known_here(self) -> bool:
        """Whether the job of every file, if there are any, is in this job store."""
        async for files in self._artifacts.files(MAX_FILES_READ):
            job_ids = {file.job_id for file in files}
            if len(await self._store.get_all(job_ids)) < len(job_ids):
                return False
        return True

    async def _remove(self, files: Collection[StoredFile]) -> int:
        if files:
            await self._artifacts.remove_files(files)
        return len(files)
