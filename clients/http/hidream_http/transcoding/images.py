"""The stream of an image as one file of HTTP: with its type and size, an ETag, and parts of it (RFC 9110)."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from hidream.v1 import image_gen_pb2, image_pb2
from hidream_http.draining import Drain
from hidream_http.leaving import unless_left
from hidream_http.parts import PartsResponse
from hidream_http.problems import Problem, ProblemError, Violation, invalid

_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*", re.IGNORECASE)

Download = Callable[[image_gen_pb2.DownloadImageRequest], AsyncGenerator[image_gen_pb2.DownloadImageResponse]]


async def image_response(
    request: Request, drain: Drain, download: Download, message: image_gen_pb2.DownloadImageRequest
) -> Response:
    """The answer with an image, a part of it, or nothing but that it has not changed.

    Args:
        request: of HTTP.
        drain: of the bridge.
        download: begins a download.
        message: which image.

    Raises:
        ServerError: the server refuses.
        ProblemError: the range lies outside of the image, or the caller has left.
    """
    if message.offset:
        raise invalid(Violation("offset", "is for gRPC; over HTTP it is the header Range: bytes=START-"))
    chunks = _chunks(download(message))
    try:
        # The first piece describes the image; without it there is nothing to answer with.
        first = await unless_left(request, drain, anext(chunks, None))
        if first is None:
            raise ProblemError(Problem(HTTPStatus.BAD_GATEWAY, "the server has sent no image", "INTERNAL"))
        headers = _headers(message, first.image)
        if _names(request.headers.get("if-none-match"), headers["ETag"]):
            await chunks.aclose()
            kept = ("ETag", "Cache-Control")
            return Response(status_code=304, headers={name: headers[name] for name in kept})
        part = _part(request, headers["ETag"], first.image.size_bytes)
    except BaseException:
        await chunks.aclose()
        raise
    status = HTTPStatus.OK
    if part is not None:
        status = HTTPStatus.PARTIAL_CONTENT
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{first.image.size_bytes}"
    asked = range(first.image.size_bytes) if part is None else part
    headers["Content-Length"] = str(len(asked))
    if request.method == "HEAD":
        await chunks.aclose()
        return Response(status_code=status, headers=headers)
    if asked.start:
        await chunks.aclose()
        message.offset = asked.start
        return PartsResponse(
            drain.is_over, _bytes(None, _chunks(download(message)), asked), headers, status_code=status
        )
    return PartsResponse(drain.is_over, _bytes(first, chunks, asked), headers, status_code=status)


async def _chunks(
    responses: AsyncGenerator[image_gen_pb2.DownloadImageResponse],
) -> AsyncGenerator[image_pb2.ImageChunk]:
    async with aclosing(responses):
        async for response in responses:
            yield response.chunk


async def _bytes(
    first: image_pb2.ImageChunk | None, chunks: AsyncGenerator[image_pb2.ImageChunk], asked: range
) -> AsyncGenerator[bytes]:
    """The bytes asked for.

    Raises:
        ProblemError: they are not those announced.
    """
    position, digest = asked.start, hashlib.sha256()
    async with aclosing(chunks):
        chunk = first or await anext(chunks, None)
        while chunk is not None and position < asked.stop:
            if chunk.offset != position:
                raise _damaged(f"byte {position} is followed by byte {chunk.offset}")
            data = chunk.data[: asked.stop - position]
            digest.update(data)
            position += len(data)
            if len(asked) == chunk.image.size_bytes == position and digest.digest() != chunk.image.sha256:
                raise _damaged("it has another SHA-256 than was announced")
            yield data
            chunk = await anext(chunks, None)
        if position < asked.stop:
            raise _damaged(f"it ends at byte {position} of {asked.stop}")


def _damaged(reason: str) -> ProblemError:
    return ProblemError(
        Problem(HTTPStatus.BAD_GATEWAY, f"the image is not as announced: {reason}", "DATA_LOSS")
    )


def _headers(message: image_gen_pb2.DownloadImageRequest, info: image_pb2.ImageInfo) -> dict[str, str]:
    ending = info.mime_type.rpartition("/")[2]
    return {
        "Content-Type": info.mime_type,
        "ETag": f'"{info.sha256.hex()}"',
        "Repr-Digest": f"sha-256=:{base64.b64encode(info.sha256).decode()}:",
        "Accept-Ranges": "bytes",
        # It never changes, but it may be deleted, and its caller may lose the right to see it.
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'inline; filename="{message.job_id}_{message.image_index}.{ending}"',
        "X-Content-Type-Options": "nosniff",
    }


def _names(condition: str | None, etag: str) -> bool:
    """Whether a condition such as If-None-Match names the image."""
    if condition is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return etag in tags or "*" in tags


def _part(request: Request, etag: str, size_bytes: int) -> range | None:
    """The part that a request asks for; None for the whole, also where several are asked for.

    Raises:
        ProblemError: it lies outside of the image.
    """
    condition = request.headers.get("if-range")
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    if match is None or not (match[1] or match[2]) or (condition is not None and condition != etag):
        return None
    if match[1]:
        start, stop = int(match[1]), min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
        if match[2] and int(match[2]) < start:
            return None
    else:
        start, stop = max(size_bytes - int(match[2]), 0), size_bytes
    if start >= stop:
        headers = (("Content-Range", f"bytes */{size_bytes}"),)
        detail = f"the image has {size_bytes} bytes"
        raise ProblemError(
            Problem(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, detail, "OUT_OF_RANGE", headers=headers)
        )
    return range(start, stop)
