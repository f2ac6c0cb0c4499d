"""Downloading one image into a file, through any number of connections and processes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO, Self

from hidream.errors import StreamError
from hidream.reconnecting import ReconnectPolicy, ResumableStream
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2


def part_path(path: Path, job_id: str, image_index: int) -> Path:
    """Where the bytes of an image that has not arrived whole are kept, beside its file.

    The name says which image it is, so that no other is ever continued with it.
    """
    return path.with_name(f".{path.name}.{job_id}-{image_index}.part")


class Download(
    ResumableStream[image_gen_pb2.DownloadImageRequest, image_gen_pb2.DownloadImageResponse, None]
):
    """One image on its way into a file: use it in a `with`, and `save` it when it is over.

    The file appears whole or not at all. What arrived before is kept, and the next download of the
    same image into the same file goes on from there.
    """

    def __init__(self, job: job_pb2.Job, image_index: int, path: Path, policy: ReconnectPolicy) -> None:
        super().__init__(policy)
        self._job_id = job.job_id
        self._image_index = image_index
        self._path = path
        self._part_path = part_path(path, job.job_id, image_index)
        # Absent from a job that has not drawn it yet: the server then says so in its own words.
        self._info = next((info for info in job.images if info.index == image_index), None)
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._part: BinaryIO

    def __enter__(self) -> Self:
        self._part = self._part_path.open("a+b")
        self._part.seek(0)
        while data := self._part.read(1 << 20):
            self._sha256.update(data)
            self._num_bytes += len(data)
        return self

    def __exit__(self, *_: object) -> None:
        self._part.close()
        if not self._num_bytes:
            self._part_path.unlink(missing_ok=True)

    @property
    def is_over(self) -> bool:
        """Whether every byte is there."""
        return self._info is not None and self._num_bytes >= self._info.size_bytes

    def request(self) -> image_gen_pb2.DownloadImageRequest:
        """For the bytes that are not there yet."""
        return image_gen_pb2.DownloadImageRequest(
            job_id=self._job_id, image_index=self._image_index, offset=self._num_bytes
        )

    def read(self, response: image_gen_pb2.DownloadImageResponse) -> None:
        """Write the next piece down; StreamError where it is out of place."""
        chunk = response.chunk
        if chunk.offset != self._num_bytes:
            raise StreamError(
                f"image {self._image_index}: a piece at byte {chunk.offset} after byte {self._num_bytes}"
            )
        self._info = chunk.image
        self._part.write(chunk.data)
        self._sha256.update(chunk.data)
        self._num_bytes += len(chunk.data)

    def ended(self) -> None:
        """Raises StreamError when the image is not whole."""
        if not self.is_over:
            raise StreamError(f"image {self._image_index}: the stream ended before the image did")

    def save(self) -> image_pb2.ImageInfo:
        """Give the file its name.

        Raises:
            StreamError: the bytes are not those announced; they are thrown away.
            OSError: the folder may not be written to.
        """
        assert self._info is not None
        self._part.close()
        if self._num_bytes != self._info.size_bytes or self._sha256.digest() != self._info.sha256:
            self._part_path.unlink()
            raise StreamError(
                f"image {self._image_index}: the bytes have another SHA-256 than announced; "
                "they were thrown away"
            )
        self._part_path.replace(self._path)
        return self._info
