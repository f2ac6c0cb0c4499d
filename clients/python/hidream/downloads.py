"""Downloading one image into a file, through any number of connections and processes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import BinaryIO, Self

from hidream.errors import BrokenImageError, DataLossError
from hidream.images import ImageCheck
from hidream.reconnecting import ReconnectPolicy, ResumableStream
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream.writing import append, followed, is_replaceable


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
    same image into the same file goes on from there. A device or a pipe gets the image when it is whole.
    """

    def __init__(self, job: job_pb2.Job, image_index: int, path: Path, policy: ReconnectPolicy) -> None:
        super().__init__(policy)
        self.job_id = job.job_id
        self._image_index = image_index
        self._path = followed(path)
        # Nothing can lie beside a device or a pipe, and nothing is kept for another download into it.
        self._folder = None if is_replaceable(self._path) else tempfile.TemporaryDirectory(prefix="hidream-")
        near = self._path if self._folder is None else Path(self._folder.name) / self._path.name
        self._part_path = part_path(near, job.job_id, image_index)
        # A job that has not finished the image does not list it; the server's error then says so.
        announced = next((info for info in job.images if info.index == image_index), None)
        self._check = ImageCheck(image_index, announced)
        self._part: BinaryIO

    def __enter__(self) -> Self:
        self._part = self._part_path.open("a+b")
        self._part.seek(0)
        while data := self._part.read(1 << 20):
            self._check.resume(data)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._part.close()
        if not self._check.num_bytes or isinstance(error, DataLossError):
            self._part_path.unlink(missing_ok=True)
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def is_over(self) -> bool:
        """Whether every byte is there."""
        return self._check.is_whole

    def request(self) -> image_gen_pb2.DownloadImageRequest:
        """Return the request for the bytes that are not there yet."""
        return image_gen_pb2.DownloadImageRequest(
            job_id=self.job_id, image_index=self._image_index, offset=self._check.num_bytes
        )

    def read(self, response: image_gen_pb2.DownloadImageResponse) -> None:
        """Write the next piece down; BrokenImageError where it is not as announced."""
        self._check.add(response.chunk)
        self._part.write(response.chunk.data)

    def ended(self) -> None:
        """Say that a call has ended with OK; raises BrokenImageError when the image is not whole."""
        if not self.is_over:
            self._check.finish()

    def save(self) -> image_pb2.ImageInfo:
        """Give the file its name, or write it to a device or a pipe.

        Raises:
            BrokenImageError: the bytes are not those announced; they are thrown away.
            OSError: the folder may not be written to.
        """
        self._part.close()
        try:
            self._check.finish()
        except BrokenImageError:
            self._part_path.unlink()
            raise
        assert self._check.announced is not None
        if self._folder is None:
            self._part_path.replace(self._path)
        else:
            append(self._path, self._part_path.read_bytes())
        return self._check.announced
