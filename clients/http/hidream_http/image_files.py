"""Where a finished image can be had over HTTP, by the address that programs without gRPC are told."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hidream.errors import NotFoundError
from hidream.v1 import image_gen_pb2, image_pb2, job_pb2
from hidream_http.bridge import Bridge
from hidream_http.transcoding.images import image_response

PATH = "/images/{job_id}/{file_name}"
ROUTE_NAME = "image_file"
_FORWARDED_SCHEME = "x-forwarded-proto"


def image_url(request: Request, job_id: str, image: image_pb2.ImageInfo) -> str:
    """The address of an image, at the host and by the scheme that the caller reaches this bridge by."""
    url = request.url_for(ROUTE_NAME, job_id=job_id, file_name=file_name_of(image))
    scheme = request.headers.get(_FORWARDED_SCHEME)
    # Only the caller that names it sees the address, so no proxy need be trusted.
    return str(url.replace(scheme=scheme) if scheme in ("http", "https") else url)


def file_name_of(image: image_pb2.ImageInfo) -> str:
    """The name of an image's file, such as `0.png`."""
    return f"{image.index}.{image.mime_type.removeprefix('image/')}"


async def job_of(bridge: Bridge, request: Request, job_id: str) -> job_pb2.Job:
    """The job as it is now.

    Raises:
        HTTPException: there is no such job.
        ServerError: the server refuses.
    """
    message = image_gen_pb2.GetJobRequest(job_id=job_id)
    try:
        return await bridge.caller(request).answer(bridge.stub.GetJob, message)
    except NotFoundError:
        raise HTTPException(404, "Task not found") from None


async def image_file_response(bridge: Bridge, request: Request, job_id: str, image_index: int) -> Response:
    """The bytes of a finished image, read from the server as the caller takes them."""
    caller = bridge.caller(request)
    message = image_gen_pb2.DownloadImageRequest(job_id=job_id, image_index=image_index)
    return await image_response(
        request, bridge.drain, lambda asked: caller.stream(bridge.stub.DownloadImage, asked), message
    )
