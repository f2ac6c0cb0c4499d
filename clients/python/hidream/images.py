"""Finished images, and how the pieces that a stream carries become one again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from hidream.errors import StreamError
from hidream.v1 import image_pb2


@dataclass(frozen=True, slots=True)
class Image:
    """One finished image.

    Attributes:
        index: which image of its request, from 0.
        width, height: in pixels.
        seed: draws this image alone.
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


class ImageAssembler:
    """Puts the pieces of the images of one job together, and checks every one of them."""

    def __init__(self) -> None:
        self._unfinished: dict[int, bytearray] = {}
        self._finished: set[int] = set()

    @property
    def num_finished(self) -> int:
        """Images that are complete."""
        return len(self._finished)

    def add(self, chunk: image_pb2.ImageChunk) -> Image | None:
        """Take the next piece; gives the image when it was the last of it.

        Raises:
            StreamError: the piece is not where the last one ended, is larger than the image, or
                completes bytes that have another SHA-256 than the image.
        """
        info = chunk.image
        if info.index in self._finished:
            raise StreamError(f"image {info.index}: a piece after the last one")
        data = self._unfinished.setdefault(info.index, bytearray())
        if chunk.offset != len(data):
            raise StreamError(f"image {info.index}: a piece at byte {chunk.offset} after byte {len(data)}")
        data += chunk.data
        if len(data) > info.size_bytes:
            raise StreamError(f"image {info.index}: more than its {info.size_bytes} bytes")
        if len(data) < info.size_bytes:
            return None
        del self._unfinished[info.index]
        if hashlib.sha256(data).digest() != info.sha256:
            raise StreamError(f"image {info.index}: the bytes have another SHA-256 than announced")
        self._finished.add(info.index)
        return Image(
            index=info.index,
            width=info.width,
            height=info.height,
            seed=info.seed,
            mime_type=info.mime_type,
            sha256=info.sha256,
            data=bytes(data),
        )
