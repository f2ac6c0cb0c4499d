"""Finished images, and how the pieces that a stream carries become one again."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hidream.errors import BrokenImageError
from hidream.v1 import image_pb2
from hidream.writing import write_file


@dataclass(frozen=True, slots=True, repr=False)
class Image:
    """One finished image.

    Attributes:
        index: which image of its request, from 0.
        width, height: in pixels.
        seed: the seed that gives this image alone.
        mime_type: such as `image/png`.
        sha256: of `data`, 32 bytes; checked on arrival.
        data: the file.
    """

    index: int
    width: int
    height: int
    seed: int
    mime_type: str
    sha256: bytes
    data: bytes

    def __repr__(self) -> str:
        return (
            f"Image(index={self.index}, {self.width}×{self.height}, seed={self.seed}, {self.mime_type}, "
            f"{len(self.data):,} bytes)"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, which appears whole or not at all; an older one is replaced.

        Raises:
            OSError: the folder is missing or full, or may not be written to.
        """
        write_file(Path(path), self.data)

    def _repr_png_(self) -> bytes | None:
        """Return what a notebook shows of a PNG."""
        return self.data if self.mime_type == "image/png" else None

    def _repr_jpeg_(self) -> bytes | None:
        """Return what a notebook shows of a JPEG."""
        return self.data if self.mime_type == "image/jpeg" else None

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows of a WebP, for which it has no method of its own."""
        if self.mime_type != "image/webp":
            return None
        return f'<img src="data:image/webp;base64,{base64.b64encode(self.data).decode()}">'


class ImageCheck:
    """Compares the pieces of one image with its announcement: their place, their size, the SHA-256."""

    def __init__(self, image_index: int, announced: image_pb2.ImageInfo | None = None) -> None:
        """The announcement may also come with the first piece."""
        self._image_index = image_index
        self._announced = announced
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0

    @property
    def announced(self) -> image_pb2.ImageInfo | None:
        """The image as it was announced; None before its announcement."""
        return self._announced

    @property
    def num_bytes(self) -> int:
        """Number of bytes that have arrived."""
        return self._num_bytes

    @property
    def is_whole(self) -> bool:
        """Whether every byte is there."""
        return self._announced is not None and self._num_bytes >= self._announced.size_bytes

    def resume(self, data: bytes) -> None:
        """Count bytes that arrived earlier; only their SHA-256 will tell whether they are right."""
        self._sha256.update(data)
        self._num_bytes += len(data)

    def add(self, chunk: image_pb2.ImageChunk) -> None:
        """Count the next piece.

        Raises:
            BrokenImageError: it belongs to another image, is not where the last one ended, is empty, or
                is larger than what is left of the image.
        """
        info = chunk.image
        if info.index != self._image_index or not self._is_announced(info):
            raise self._broken("a piece of another image")
        if self.is_whole:
            raise self._broken("a piece after the last one")
        if chunk.offset != self._num_bytes:
            raise self._broken(f"a piece at byte {chunk.offset} after byte {self._num_bytes}")
        # Without end, they would keep a reader for ever.
        if not chunk.data:
            raise self._broken(f"an empty piece at byte {chunk.offset}")
        if self._num_bytes + len(chunk.data) > info.size_bytes:
            raise self._broken(f"more than its {info.size_bytes} bytes")
        self._announced = info
        self.resume(chunk.data)

    def finish(self) -> None:
        """Say that no more will come.

        Raises:
            BrokenImageError: bytes are missing, or they have another SHA-256 than announced.
        """
        if self._announced is None or not self.is_whole:
            raise self._broken("the stream ended before the image did")
        is_right_size = self._num_bytes == self._announced.size_bytes
        if not is_right_size or self._sha256.digest() != self._announced.sha256:
            raise self._broken("the bytes have another SHA-256 than announced")

    def _is_announced(self, info: image_pb2.ImageInfo) -> bool:
        return self._announced is None or is_same_file(info, self._announced)

    def _broken(self, reason: str) -> BrokenImageError:
        return BrokenImageError(self._image_index, reason)


def is_same_file(first: image_pb2.ImageInfo, second: image_pb2.ImageInfo) -> bool:
    """Whether both announce the same bytes."""
    return first.size_bytes == second.size_bytes and first.sha256 == second.sha256


class ImageAssembler:
    """Puts the pieces of the images of one job together, and checks every one of them."""

    def __init__(self) -> None:
        self._checks: dict[int, ImageCheck] = {}
        self._unfinished: dict[int, bytearray] = {}

    @property
    def num_finished(self) -> int:
        """Number of images that are complete."""
        return len(self._checks) - len(self._unfinished)

    def add(self, chunk: image_pb2.ImageChunk) -> Image | None:
        """Take the next piece; gives the image when it was the last of it.

        Raises:
            BrokenImageError: the piece is not as announced, or it completes bytes that are not.
        """
        info = chunk.image
        if info.index not in self._checks:
            self._checks[info.index] = ImageCheck(info.index)
            self._unfinished[info.index] = bytearray()
        check = self._checks[info.index]
        check.add(chunk)
        self._unfinished[info.index] += chunk.data
        if not check.is_whole:
            return None
        check.finish()
        return Image(
            index=info.index,
            width=info.width,
            height=info.height,
            seed=info.seed,
            mime_type=info.mime_type,
            sha256=info.sha256,
            data=bytes(self._unfinished.pop(info.index)),
        )

    def finish(self, infos: Iterable[image_pb2.ImageInfo] = ()) -> None:
        """Say that no more will come.

        Args:
            infos: the images that there must be.

        Raises:
            BrokenImageError: one of them, or one that has begun, is not complete, or is another one.
        """
        for info in infos:
            check = self._checks.get(info.index) or ImageCheck(info.index)
            check.finish()
            if check.announced is None or not is_same_file(info, check.announced):
                raise BrokenImageError(info.index, "it is not the one that the job ended with")
        for index in self._unfinished:
            self._checks[index].finish()
