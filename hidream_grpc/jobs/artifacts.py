"""Finished images as files in a folder."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
from pathlib import Path

from hidream_grpc.errors import StorageFullError
from hidream_grpc.jobs.job import StoredImage
from hidream_grpc.model.parameters import GenerationParameters


class ArtifactStore:
    """A folder with one folder a job and one file an image. An image is there whole or not at all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    async def write(
        self, job_id: str, index: int, parameters: GenerationParameters, data: bytes
    ) -> StoredImage:
        """Store one image.

        Raises:
            StorageFullError: the folder has no room; nothing of the image is left.
        """
        sha256 = await asyncio.to_thread(self._write, job_id, index, data)
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
        """Read a part of a stored image.

        Raises:
            FileNotFoundError: the image is not there.
        """
        return await asyncio.to_thread(self._read, job_id, index, offset, length)

    async def remove(self, job_id: str) -> None:
        """Remove all images of a job, if there are any."""
        await asyncio.to_thread(shutil.rmtree, self._directory / job_id, ignore_errors=True)

    def _path(self, job_id: str, index: int) -> Path:
        return self._directory / job_id / str(index)

    def _write(self, job_id: str, index: int, data: bytes) -> bytes:
        path = self._path(job_id, index)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StorageFullError(job_id, len(data)) from error
            raise
        return hashlib.sha256(data).digest()

    def _read(self, job_id: str, index: int, offset: int, length: int) -> bytes:
        descriptor = os.open(self._path(job_id, index), os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
