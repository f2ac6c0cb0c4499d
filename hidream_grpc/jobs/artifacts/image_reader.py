"""Reads images from front to back for one stream, and checks them against their rows."""

from __future__ import annotations

import asyncio
import hashlib
import logging

from hidream_grpc.errors import ImageDamagedError, ImageNotFoundError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.job import StoredImage
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

REMOVAL_SECONDS = 2.0
"""Longest time between the removal of a job's files and that of its row, when many are removed at once."""
NUM_LOOKS = 4


class ImageReader:
    """Reads the images of one job, piece by piece, one image at a time.

    The last piece of an image is returned only when all of its bytes were those that were stored. To begin
    in the middle costs a read of what lies before.
    """

    def __init__(self, job_id: str, store: SqlJobStore, artifacts: ArtifactStore) -> None:
        self._job_id = job_id
        self._store = store
        self._artifacts = artifacts
        self._image: StoredImage | None = None
        self._position = 0
        self._hash = hashlib.sha256()

    async def read(self, image: StoredImage, offset: int, length: int) -> bytes:
        """Read so many bytes of an image, fewer at its end; the offset must be below its size.

        Raises:
            ImageDamagedError: the image is gone, short or altered.
            JobNotFoundError: its job was removed meanwhile.
            ArtifactUnavailableError: the artifact store does not answer.
        """
        if image != self._image or offset != self._position:
            self._image, self._position, self._hash = image, 0, hashlib.sha256()
        while self._position < offset:
            await self._next(image, min(length, offset - self._position))
        return await self._next(image, min(length, image.size_bytes - offset))

    async def _next(self, image: StoredImage, length: int) -> bytes:
        try:
            data = await self._artifacts.read(self._job_id, image, self._position, length)
        except ImageNotFoundError:
            await self._wait_for_removal()
            raise self._damaged(image, "it is gone") from None
        if len(data) < length:
            end = self._position + len(data)
            raise self._damaged(image, f"it ends after {end} of {image.size_bytes} bytes")
        self._hash.update(data)
        self._position += length
        if self._position == image.size_bytes and self._hash.digest() != image.sha256:
            raise self._damaged(image, "its SHA-256 is another")
        return data

    async def _wait_for_removal(self) -> None:
        """Raise JobNotFoundError if the job is just being removed: its files go before its row."""
        for _ in range(NUM_LOOKS):
            await self._store.get(None, self._job_id)
            await asyncio.sleep(REMOVAL_SECONDS / NUM_LOOKS)

    def _damaged(self, image: StoredImage, reason: str) -> ImageDamagedError:
        facts = {"job_id": self._job_id, "image_index": image.index}
        logger.error("image %d is not what was stored: %s", image.index, reason, extra=facts)
        return ImageDamagedError(self._job_id, image.index)
