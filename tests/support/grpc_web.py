"""gRPC-Web as a browser speaks it: HTTP/1.1, and frames in the body, of which the last are the trailers."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from google.protobuf.message import Message

MEDIA_TYPE = "application/grpc-web+proto"
TRAILERS = 0x80
TIMEOUT_SECONDS = 60.0
ResponseT = TypeVar("ResponseT", bound=Message)


class WebCall(Generic[ResponseT]):
    """A call whose messages are read one after another; `trailers` is there after the last one."""

    def __init__(self, response: http.client.HTTPResponse, response_type: type[ResponseT]) -> None:
        self._response = response
        self._response_type = response_type
        self.headers = response.headers
        # A call that fails at once has its trailers as headers, and no body.
        self.trailers = {name: value for name, value in response.headers.items() if name.startswith("grpc-")}

    def __iter__(self) -> Iterator[ResponseT]:
        while head := self._response.read(5):
            frame = self._response.read(int.from_bytes(head[1:], "big"))
            if head[0] & TRAILERS:
                lines = frame.decode("ascii").splitlines()
                self.trailers |= {
                    name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)
                }
            else:
                yield self._response_type.FromString(frame)


@contextmanager
def web_call(
    port: int,
    method: str,
    request: Message,
    response_type: type[ResponseT],
    origin: str = "https://app.example",
) -> Iterator[WebCall[ResponseT]]:
    """Call a method of `ImageGen` by gRPC-Web, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        content = request.SerializeToString()
        headers = {"Content-Type": MEDIA_TYPE, "Accept": MEDIA_TYPE, "X-Grpc-Web": "1", "Origin": origin}
        body = b"\0" + len(content).to_bytes(4, "big") + content
        connection.request("POST", f"/hidream.v1.ImageGen/{method}", body, headers)
        yield WebCall(connection.getresponse(), response_type)
    finally:
        connection.close()
