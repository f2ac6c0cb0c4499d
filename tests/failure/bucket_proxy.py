"""A bucket that is slow, refuses, or says nothing: an HTTP proxy in front of the S3 server."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.s3_server import S3Server

HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Put:
    """One object that was written; monotonic seconds of its request and of its answer."""

    path: str
    start_seconds: float
    end_seconds: float


class BucketProxy:
    """Forwards S3 requests to a server; any thread may change how.

    Attributes:
        puts: that were answered by the server, in the order of their answers.
    """

    def __init__(self, server: S3Server) -> None:
        self._server = server
        self._put_delay_seconds = 0.0
        self._refuses = False
        self._is_open = threading.Event()
        self._is_open.set()
        self._is_closed = False
        self.puts: list[Put] = []
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._listener.daemon_threads = True
        self._thread = threading.Thread(target=self._listener.serve_forever, name="bucket proxy")
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know, by the variables that S3 clients read."""
        endpoint = f"http://127.0.0.1:{self._listener.server_address[1]}"
        return {**self._server.environment, "AWS_ENDPOINT_URL": endpoint}

    def delay_puts(self, seconds: float) -> None:
        """Answer each PUT from now on so long after the server has."""
        self._put_delay_seconds = seconds

    def refuse(self) -> None:
        """Answer 503 to every request, until `heal`."""
        self._refuses = True

    def silence(self) -> None:
        """Take requests and answer none, until `heal`."""
        self._is_open.clear()

    def heal(self) -> None:
        """Answer at once again, and answer what was held in silence."""
        self._put_delay_seconds = 0.0
        self._refuses = False
        self._is_open.set()

    def close(self) -> None:
        """Take no more requests."""
        self._is_closed = True
        self._is_open.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request as the fault of the moment has it."""
        start_seconds = time.monotonic()
        data = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        self._is_open.wait()
        if self._is_closed:
            handler.close_connection = True
        elif self._refuses:
            _send(handler, 503, [("Content-Length", "0")], b"")
        else:
            self._forward(handler, data)
            if handler.command == "PUT":
                self.puts.append(Put(handler.path, start_seconds, time.monotonic()))

    def _forward(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        host = self._server.endpoint.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            headers = {key: value for key, value in handler.headers.items() if key.lower() not in HOP_HEADERS}
            connection.request(handler.command, handler.path, body=data, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        except OSError:
            handler.close_connection = True
            return
        finally:
            connection.close()
        if handler.command == "PUT":
            time.sleep(self._put_delay_seconds)
        kept = [(key, value) for key, value in answer.getheaders() if key.lower() not in HOP_HEADERS]
        _send(handler, answer.status, kept, body)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer: Callable[[BaseHTTPRequestHandler], None] = self.answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                # A client that gave up has reset the connection.
                with suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def do_any(self) -> None:
                answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _send(handler: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    handler.send_response_only(status)
    for key, value in headers:
        handler.send_header(key, value)
    if not any(key.lower() == "content-length" for key, _ in headers):
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def running_bucket_proxy(server: S3Server) -> Iterator[BucketProxy]:
    """A proxy that forwards at once until it is told otherwise; it ends with the block."""
    proxy = BucketProxy(server)
    try:
        yield proxy
    finally:
        proxy.close()
