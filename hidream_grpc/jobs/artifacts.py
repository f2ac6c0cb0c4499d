"""Finished images and snapshots of jobs, in a folder or in an S3 bucket.

    images/<job_id>/<index>       the file that the caller gets
    snapshots/<job_id>/newest     what a running job can go on from

Each is there whole or not at all, whoever is killed and whatever runs full.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from obstore.exceptions import BaseError

from hidream_grpc.errors import ArtifactUnavailableError, ImageNotFoundError, StorageFullError
from hidream_grpc.jobs.job import StoredImage
from hidream_grpc.jobs.objects import ArtifactTimeouts, first_line, is_full, open_objects
from hidream_grpc.model.parameters import GenerationParameters

logger = logging.getLogger(__name__)

MAX_CALLS_AT_ONCE = 16
RETRY_AFTER_SECONDS = 5.0

Result = TypeVar("Result")


class ArtifactStore:
    """The images and snapshots of all jobs; what every replica sees, where they share the store.

    No call blocks the event loop, and each ends within the timeouts. A call that is cancelled, or that
    took too long, may still have its effect. All may be repeated.

    Every call raises ArtifactUnavailableError while the store does not answer, or refuses us.
    """

    def __init__(self, location: Path | str, timeouts: ArtifactTimeouts = ArtifactTimeouts()) -> None:  # noqa: B008
        """Open a folder by path or file:// URL, or a bucket by s3:// URL; a bucket is not asked yet.

        Raises:
            ConfigurationError: the URL names neither, or the folder cannot be made.
        """
        self._objects = open_objects(location, timeouts)
        self._timeouts = timeouts
        # Threads of our own: a store that hangs takes nobody else's. Not obstore's async calls: their
        # results come from a thread that aborts the process if it meets the interpreter's end (obstore
        # 0.12.1, one exit in ten).
        self._threads = ThreadPoolExecutor(MAX_CALLS_AT_ONCE, thread_name_prefix="artifacts")

    async def write(
        self, job_id: str, index: int, parameters: GenerationParameters, data: bytes
    ) -> StoredImage:
        """Store one image, durably; a second time replaces it.

        Raises:
            StorageFullError: the store has no room; nothing of the image is left.
        """
        sha256 = await self._in_thread(lambda: hashlib.sha256(data).digest())
        await self._put(job_id, _image_key(job_id, index), data)
        return StoredImage(
            index=index,
            width=parameters.width,
            height=parameters.height,
            seed=parameters.seed + index,
            mime_type=parameters.output_format.mime_type,
            size_bytes=len(data),
            sha256=sha256,
        )

    async def read(self, job_id: str, index: int, offset: int, length: int) -> bytes:
        """Read up to length bytes of a stored image; none beyond its end.

        Raises:
            ImageNotFoundError: the image is not there.
        """
        try:
            key = _image_key(job_id, index)
            return await self._call(lambda: self._objects.get_range(key, offset, length))
        except FileNotFoundError:
            raise ImageNotFoundError(job_id, index) from None

    async def write_snapshot(self, job_id: str, data: bytes) -> None:
        """Store the newest snapshot of a job, durably; the one before stays until this one is whole.

        Raises:
            StorageFullError: the store has no room.
        """
        await self._put(job_id, _snapshot_key(job_id), data)

    async def read_snapshot(self, job_id: str) -> bytes | None:
        """The newest snapshot of a job; None when there is none."""
        try:
            return await self._call(lambda: self._objects.get(_snapshot_key(job_id)))
        except FileNotFoundError:
            return None

    async def remove_snapshot(self, job_id: str) -> None:
        """Remove the snapshot of a job, if there is one."""
        await self._call(lambda: self._objects.remove_below(f"snapshots/{job_id}"))

    async def remove(self, job_id: str) -> None:
        """Remove all images of a job and its snapshot, if there are any."""
        await self._call(lambda: self._objects.remove_below(f"images/{job_id}"))
        await self.remove_snapshot(job_id)

    async def _put(self, job_id: str, key: str, data: bytes) -> None:
        try:
            await self._call(lambda: self._objects.put(key, data))
        except _FullError as error:
            raise StorageFullError(job_id, len(data)) from error
        except FileNotFoundError as error:
            raise _unavailable("the bucket or the folder is not there") from error

    async def _call(self, call: Callable[[], Result]) -> Result:
        """Do it in a thread; raises FileNotFoundError, _FullError or ArtifactUnavailableError."""
        try:
            async with asyncio.timeout(self._timeouts.call_seconds):
                return await self._in_thread(call)
        except FileNotFoundError:
            raise
        except TimeoutError as error:
            raise _unavailable(f"no answer in {self._timeouts.call_seconds:g} s") from error
        except (BaseError, OSError) as error:
            if is_full(error):
                raise _FullError from error
            raise _unavailable(first_line(error)) from error

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class _FullError(Exception):
    """The store has no room for an object."""


def _unavailable(reason: str) -> ArtifactUnavailableError:
    # The reason may name hosts and folders: it is for the operator, not for callers.
    logger.warning("the artifact store is not available: %s", reason)
    return ArtifactUnavailableError(RETRY_AFTER_SECONDS)


def _image_key(job_id: str, index: int) -> str:
    return f"images/{job_id}/{index}"


def _snapshot_key(job_id: str) -> str:
    return f"snapshots/{job_id}/newest"
