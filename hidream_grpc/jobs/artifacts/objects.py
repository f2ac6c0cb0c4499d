"""Objects in an S3 bucket or a folder, each whole or absent. Every call blocks: call from a thread."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.jobs.folders import make_writable

ARTIFACTS_FLAG = "--artifacts"
MAX_RETRIES = 4

_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_URL = re.compile(r"file://(localhost)?(?P<folder>/.*)|s3://[^/@:]+(/.*)?", re.DOTALL)
# What begins another part of a URL, what its parsers remove, and a % without its two digits.
_NOT_IN_URLS = re.compile(r"[?#\x00-\x1f\x7f]|[ ]\Z|%(?![0-9A-Fa-f]{2})")
# obstore names these in its text alone; the last three are what MinIO and Ceph answer.
_FULL = re.compile(
    rf"\(os error ({'|'.join(map(str, _FULL_ERRNOS))})\)"
    r"|\b(507 Insufficient Storage|XMinioStorageFull|QuotaExceeded)\b"
)


@dataclass(frozen=True, slots=True)
class ArtifactTimeouts:
    """How long a store may take to connect, to answer one request, and for a call with its retries."""

    connect_seconds: float = 3.0
    request_seconds: float = 15.0
    call_seconds: float = 30.0


class Objects:
    """A bucket; errors are obstore's, and FileNotFoundError for an object that is not there."""

    def __init__(self, store: S3Store | LocalStore) -> None:
        self._store = store

    def put(self, key: str, data: bytes) -> None:
        """Make an object, or replace it at once; it is durable when this returns."""
        # One request: the parts of a multipart upload would stay behind if we were killed.
        obstore.put(self._store, key, data, use_multipart=False)

    def get(self, key: str) -> bytes:
        """Read all bytes of an object."""
        return bytes(obstore.get(self._store, key).bytes())

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Read up to length bytes from an offset on; none beyond the end."""
        try:
            if length > 0:
                return bytes(obstore.get_range(self._store, key, start=offset, length=length))
        except BaseError:
            # A range that begins at the end is an error to stores, without a type of its own.
            if offset < obstore.head(self._store, key)["size"]:
                raise
        return b""

    def put_new(self, key: str, data: bytes) -> None:
        """Make an object, unless there is one."""
        with contextlib.suppress(AlreadyExistsError):
            obstore.put(self._store, key, data, mode="create", use_multipart=False)

    def keys(self, folder: str, max_keys: int) -> Iterator[list[str]]:
        """The keys of all objects of a folder, in lists of at most `max_keys`."""
        for found in obstore.list(self._store, folder, chunk_size=max_keys):
            yield [item["path"] for item in found]

    def remove(self, keys: list[str]) -> None:
        """Remove objects; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, keys)

    def remove_below(self, folder: str) -> None:
        """Remove all objects of a folder, if there are any."""
        for found in obstore.list(self._store, folder):
            obstore.delete(self._store, [item["path"] for item in found])


class FolderObjects(Objects):
    """A folder: obstore writes into a staged file beside the object, and renames it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(LocalStore(directory, mkdir=True))
        self._directory = directory.resolve()

    def put(self, key: str, data: bytes) -> None:
        """Make an object, or replace it at once; it is durable when this returns."""
        self._check()
        super().put(key, data)
        path = self._directory / key
        try:
            # obstore does not sync. The last is the folder that has the entry of a new job.
            for each in (path, *list(path.parents)[: key.count("/")]):
                _sync(each)
        except FileNotFoundError:
            # Removed again already, with its job or by another server's probe; or all of it is away.
            self._check()
        except OSError:
            # A network file system may report only now that it had no room.
            path.unlink(missing_ok=True)
            raise

    def put_new(self, key: str, data: bytes) -> None:
        """Make an object, unless there is one."""
        self._check()
        super().put_new(key, data)

    def _check(self) -> None:
        # obstore would make it anew, and what was moved away could not be put back.
        if not self._directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self._directory))

    def keys(self, folder: str, max_keys: int) -> Iterator[list[str]]:
        """The keys of all objects of a folder, and of staged files, in lists of at most `max_keys`."""
        # Not Path.rglob: it fails when a folder is removed meanwhile.
        walk = os.walk(self._directory / folder)
        paths = (Path(parent, name) for parent, _, names in walk for name in names)
        keys = (str(path.relative_to(self._directory)) for path in paths)
        while some := list(itertools.islice(keys, max_keys)):
            yield some

    def remove(self, keys: list[str]) -> None:
        """Remove objects, and the folders that are empty then; what is gone already is no error."""
        for key in keys:
            path = self._directory / key
            path.unlink(missing_ok=True)
            for folder in list(path.parents)[: key.count("/") - 1]:
                # Others are in it, or it is gone.
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def remove_below(self, folder: str) -> None:
        """Remove all objects of a folder, and staged files of writers that were killed."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._directory / folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_objects(location: Path | str, timeouts: ArtifactTimeouts) -> Objects:
    """Open a folder by path or file:// URL, or a bucket by s3://bucket/prefix, without connecting.

    Raises:
        ConfigurationError: the URL names neither, or the folder cannot be made.
    """
    if isinstance(location, Path):
        return _open_folder(location)
    if (folder := _folder_of(location)) is not None:
        return _open_folder(folder)
    try:
        store = S3Store.from_url(
            location,
            client_options={
                # An http:// endpoint was named on purpose.
                "allow_http": True,
                "connect_timeout": timedelta(seconds=timeouts.connect_seconds),
                "timeout": timedelta(seconds=timeouts.request_seconds),
            },
            retry_config={
                "max_retries": MAX_RETRIES,
                "retry_timeout": timedelta(seconds=timeouts.request_seconds),
            },
        )
    except (BaseError, ValueError) as error:
        raise ConfigurationError(ARTIFACTS_FLAG, f"{location!r}: {first_line(error)}") from None
    return Objects(store)


def _folder_of(url: str) -> Path | None:
    """The folder of a file:// URL; None for an s3:// URL. What parsers drop in silence is refused."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigurationError(ARTIFACTS_FLAG, f"{url!r} is neither file:///FOLDER nor s3://BUCKET/PREFIX")
    if wrong := _NOT_IN_URLS.search(url):
        reason = f"{url!r}: in a URL {wrong[0]!r} is written {quote(wrong[0], safe='')}"
        raise ConfigurationError(ARTIFACTS_FLAG, reason)
    if match["folder"] is None:
        return None
    folder = os.fsdecode(unquote_to_bytes(match["folder"]))
    if "\0" in folder:
        raise ConfigurationError(ARTIFACTS_FLAG, f"{url!r}: a folder's name cannot hold %00")
    return Path(folder)


def _open_folder(directory: Path) -> FolderObjects:
    try:
        make_writable(directory)
        return FolderObjects(directory)
    except (BaseError, OSError) as error:
        text = error.strerror if isinstance(error, OSError) else None
        reason = f"cannot write to {directory}: {text or first_line(error)}"
        raise ConfigurationError(ARTIFACTS_FLAG, reason) from None


def is_full(error: BaseError | OSError) -> bool:
    """Whether a store refused an object because it has no room, or the quota is used up."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_ERRNOS
    return _FULL.search(str(error)) is not None


def first_line(error: Exception) -> str:
    """The first line of an error of obstore, without the dump of data that follows."""
    return str(error).partition("\n")[0]
