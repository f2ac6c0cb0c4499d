"""Finished images and snapshots of jobs, in a folder or in an S3 bucket.

    images/<job_id>/<claim_number>/<index>     the file that the caller gets
    snapshots/<job_id>/<claim_number>          what a running job can go on from
    store_id                                   the job store that all of these belong to
    probes/probe                               what servers write and remove to see that they can

Each is there whole or not at all, whatever is killed and whatever runs full. A key holds the number of the
claim that wrote it, and the job's row says which counts: a server that is late overwrites nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from obstore.exceptions import BaseError

from hidream_grpc.errors import ArtifactUnavailableError, ImageNotFoundError, StorageFullError
from hidream_grpc.jobs.artifacts.objects import ArtifactTimeouts, first_line, is_full, open_objects
from hidream_grpc.jobs.job import StoredImage
from hidream_grpc.model.parameters import GenerationParameters

MAX_CALLS_AT_ONCE = 16
RETRY_AFTER_SECONDS = 5.0

IMAGES = "images"
SNAPSHOTS = "snapshots"
PROBES = "probes"
PROBE_KEY = f"{PROBES}/probe"
"""One for all servers: at most one object stays behind where the bucket lets nothing be removed."""
STORE_ID = "store_id"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An image; or, without an index, a snapshot or what a writer that was killed left half written."""

    key: str
    job_id: str
    claim_number: int
    index: int | None


class ArtifactStore:
    """The images and snapshots of all jobs, for every replica that shares the store.

    No call blocks the event loop, and each ends within the timeouts. A call that is cancelled, or that
    took too long, may still have its effect. All may be repeated.

    Every call raises ArtifactUnavailableError while the store does not answer, or refuses us.

    Attributes:
        observe_call: called when a call but `probe` has ended: whether it wrote, and what it failed with.
        max_call_seconds: a call has ended by then, or failed.
    """

    def __init__(self, location: Path | str, timeouts: ArtifactTimeouts = ArtifactTimeouts()) -> None:  # noqa: B008
        """Open a folder by path or file:// URL, or a bucket by s3:// URL; a bucket is not asked yet.

        Raises:
            ConfigurationError: the URL names neither, or the folder cannot be made.
        """
        self.observe_call: Callable[[bool, ArtifactUnavailableError | None], None] = lambda is_write, error: (
            None
        )
        self._location = location
        self._objects = open_objects(location, timeouts)
        self.max_call_seconds = timeouts.call_seconds
        # Threads of our own: a store that hangs takes nobody else's. Not obstore's async calls: their
        # results come from a thread that aborts the process if it meets the interpreter's end (obstore
        # 0.12.1, one exit in ten).
        self._threads = ThreadPoolExecutor(MAX_CALLS_AT_ONCE, thread_name_prefix="artifacts")

    async def probe(self) -> None:
        """Write, read, list and remove an object, as the jobs need it; a store without room works, too."""

        def use() -> None:
            self._objects.put(PROBE_KEY, b"")
            # Another server, or a probe that took too long, may have removed it already.
            with contextlib.suppress(FileNotFoundError):
                self._objects.get(PROBE_KEY)
            next(self._objects.keys(PROBES, 1), None)
            self._objects.remove([PROBE_KEY])

        with contextlib.suppress(_FullError):
            await self._try(use, is_missing_allowed=False)

    async def write(
        self, job_id: str, claim_number: int, index: int, parameters: GenerationParameters, data: bytes
    ) -> StoredImage:
        """Store one image, durably; a second time, by the same claim, replaces it.

        Raises:
            StorageFullError: the store has no room; nothing of the image is left.
        """
        sha256 = await self._in_thread(lambda: hashlib.sha256(data).digest())
        await self._put(job_id, _image_key(job_id, claim_number, index), data)
        return StoredImage(
            index=index,
            width=parameters.width,
            height=parameters.height,
            seed=parameters.seed + index,
            mime_type=parameters.output_format.mime_type,
            size_bytes=len(data),
            sha256=sha256,
            claim_number=claim_number,
        )

    async def read(self, job_id: str, image: StoredImage, offset: int, length: int) -> bytes:
        """Read up to length bytes of a stored image; none beyond its end.

        Raises:
            ImageNotFoundError: the image is not there.
        """
        key = _image_key(job_id, image.claim_number, image.index)
        try:
            return await self._call(lambda: self._objects.get_range(key, offset, length))
        except FileNotFoundError:
            raise ImageNotFoundError(job_id, image.index) from None

    async def write_snapshot(self, job_id: str, claim_number: int, data: bytes) -> None:
        """Store a claim's newest snapshot, durably; the one before stays until this one is whole.

        Raises:
            StorageFullError: the store has no room.
        """
        await self._put(job_id, _snapshot_key(job_id, claim_number), data)

    async def read_snapshot(self, job_id: str, claim_number: int) -> bytes | None:
        """Read the newest snapshot of a claim; None when there is none."""
        key = _snapshot_key(job_id, claim_number)
        try:
            return await self._call(lambda: self._objects.get(key))
        except FileNotFoundError:
            return None

    async def remove_snapshots(self, job_id: str) -> None:
        """Remove the snapshots of all claims of a job, if there are any."""
        await self._call(lambda: self._objects.remove_below(f"{SNAPSHOTS}/{job_id}"))

    async def remove(self, job_id: str) -> None:
        """Remove all images of a job and its snapshots, if there are any."""
        for folder in (IMAGES, SNAPSHOTS):
            await self._call(functools.partial(self._objects.remove_below, f"{folder}/{job_id}"))

    async def store_id(self) -> str | None:
        """Id of the job store that all files belong to; None where that is not written."""
        try:
            return (await self._call(lambda: self._objects.get(STORE_ID))).decode(errors="replace")
        except FileNotFoundError:
            return None

    async def set_store_id(self, store_id: str) -> None:
        """Write which job store the files belong to, unless another server was faster: read it again then."""
        await self._call(lambda: self._objects.put_new(STORE_ID, store_id.encode()), is_write=True)

    async def files(self, max_files: int) -> AsyncIterator[tuple[StoredFile, ...]]:
        """All images and snapshots, in tuples of at most `max_files`.

        A file that is made or removed meanwhile may be missing. What has another name is passed over.
        """
        for folder in (IMAGES, SNAPSHOTS):
            listing = iter(self._objects.keys(folder, max_files))
            while keys := await self._call(functools.partial(next, listing, None)):
                yield tuple(file for file in map(_file_of, keys) if file is not None)

    async def remove_files(self, files: Collection[StoredFile]) -> None:
        """Remove files that `files` gave; one that is gone already is no error."""
        keys = [file.key for file in files]
        await self._call(lambda: self._objects.remove(keys))

    async def _put(self, job_id: str, key: str, data: bytes) -> None:
        try:
            await self._call(lambda: self._objects.put(key, data), is_write=True)
        except _FullError as error:
            raise StorageFullError(job_id, len(data)) from error

    async def _call(self, call: Callable[[], Result], is_write: bool = False) -> Result:
        """Make a call as `_try` does, and have it observed."""
        try:
            result = await self._try(call, is_missing_allowed=not is_write)
        except ArtifactUnavailableError as error:
            self.observe_call(is_write, error)
            raise
        except (FileNotFoundError, _FullError):
            self.observe_call(is_write, None)
            raise
        self.observe_call(is_write, None)
        return result

    async def _try(self, call: Callable[[], Result], is_missing_allowed: bool) -> Result:
        """Make a call in a thread.

        Raises:
            FileNotFoundError: the object is not there, and may be missing.
            _FullError: there is no room.
            ArtifactUnavailableError: the store does not answer, or refuses us.
        """
        try:
            async with asyncio.timeout(self.max_call_seconds):
                return await self._in_thread(call)
        except FileNotFoundError as error:
            if is_missing_allowed:
                raise
            raise self._unavailable("the bucket or the folder is not there") from error
        except TimeoutError as error:
            raise self._unavailable(f"no answer in {self.max_call_seconds:g} s") from error
        except (BaseError, OSError) as error:
            if is_full(error):
                raise _FullError from error
            raise self._unavailable(first_line(error)) from error

    def _unavailable(self, reason: str) -> ArtifactUnavailableError:
        return ArtifactUnavailableError(RETRY_AFTER_SECONDS, f"{self._location}: {reason}")

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class _FullError(Exception):
    """The store has no room for an object."""


def image_file(job_id: str, claim_number: int, index: int) -> StoredFile:
    """An image of a claim, whether it is stored or not."""
    return StoredFile(_image_key(job_id, claim_number, index), job_id, claim_number, index)


def _image_key(job_id: str, claim_number: int, index: int) -> str:
    # Images of before claims had numbers have none.
    return f"{IMAGES}/{job_id}/{claim_number}/{index}" if claim_number else f"{IMAGES}/{job_id}/{index}"


def _snapshot_key(job_id: str, claim_number: int) -> str:
    return f"{SNAPSHOTS}/{job_id}/{claim_number}"


def _file_of(key: str) -> StoredFile | None:
    match key.split("/"):
        case ["images", job_id, claim_number, index] if _is_job_id(job_id) and claim_number.isdecimal():
            return StoredFile(key, job_id, int(claim_number), _number(index))
        case ["images", job_id, index] if _is_job_id(job_id):
            # Of before claims had numbers.
            return StoredFile(key, job_id, 0, _number(index))
        case ["snapshots", job_id, claim_number] if _is_job_id(job_id):
            return StoredFile(key, job_id, _number(claim_number) or 0, None)
        case _:
            return None


def _is_job_id(name: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", name) is not None


def _number(name: str) -> int | None:
    return int(name) if name.isdecimal() else None
