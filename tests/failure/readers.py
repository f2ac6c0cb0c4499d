"""Streams that are read in threads, so that a test can ask whether one goes on, ends, or hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, job_pb2
from tests.support.live_server import wait_until
from tests.support.streams import request

NEWS_SECONDS = 10.0
"""A stream goes on or ends within 2 s of its server's waking; five times as long on busy cores."""
ENDS = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Received:
    """One message of a stream, with the monotonic seconds of its arrival."""

    seconds: float
    message: Any


class StreamReader:
    """Reads one stream to its end.

    Attributes:
        received: so far, in order.
        code: that it ended with; None while it is open.
        end_seconds: monotonic seconds of that end.
    """

    def __init__(self, name: str, call: Any) -> None:
        self.name = name
        self.received: list[Received] = []
        self.code: grpc.StatusCode | None = None
        self.end_seconds = 0.0
        self._call = call
        self._thread = threading.Thread(target=self._read, name=name)
        self._thread.start()

    @property
    def events(self) -> list[job_pb2.JobEvent]:
        """The events of one job's stream."""
        return [received.message.event for received in tuple(self.received)]

    @property
    def kinds(self) -> list[str]:
        return [event.WhichOneof("event") or "" for event in self.events]

    @property
    def has_ended(self) -> bool:
        return self.code is not None

    def has_news_since(self, seconds: float) -> bool:
        """Whether it has brought anything, or has ended, since then."""
        return self.has_ended or (bool(self.received) and self.received[-1].seconds > seconds)

    def wait_for(self, kind: str) -> job_pb2.JobEvent:
        """The first event of a kind, when it has come."""

        def found() -> list[job_pb2.JobEvent]:
            return [event for event in self.events if event.WhichOneof("event") == kind]

        wait_until(lambda: bool(found()) or self.has_ended, 60, f"{self.name} brings {kind}")
        assert found(), f"{self.name} ended with {self.code} after {self.kinds}"
        return found()[0]

    def wait_for_end(self, timeout_seconds: float = 60) -> grpc.StatusCode:
        """The code that it ends with."""
        wait_until(lambda: self.has_ended, timeout_seconds, f"{self.name} ends")
        assert self.code is not None
        return self.code

    def close(self) -> None:
        """Leave the stream, if it is open."""
        self._call.cancel()
        self._thread.join()

    def _read(self) -> None:
        code = grpc.StatusCode.OK
        try:
            for message in self._call:
                self.received.append(Received(time.monotonic(), message))
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            code = error.code()
        self.end_seconds = time.monotonic()
        self.code = code


class Readers:
    """Opens streams that end with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def watch(
        self, stub: image_gen_pb2_grpc.ImageGenStub, job_id: str, name: str = "WatchJob", after: int = 0
    ) -> StreamReader:
        message = image_gen_pb2.WatchJobRequest(job_id=job_id, after_sequence=after)
        return self.read(name, stub.WatchJob(message))

    def watch_all(self, stub: image_gen_pb2_grpc.ImageGenStub, name: str = "WatchJobs") -> StreamReader:
        return self.read(name, stub.WatchJobs(image_gen_pb2.WatchJobsRequest()))

    def generate(
        self,
        stub: image_gen_pb2_grpc.ImageGenStub,
        name: str = "Generate",
        timeout: float | None = None,
        **spec: Any,
    ) -> StreamReader:
        return self.read(name, stub.Generate(request(**spec), timeout=timeout))

    def read(self, name: str, call: Any) -> StreamReader:
        reader = StreamReader(name, call)
        self._stack.callback(reader.close)
        return reader


@contextmanager
def readers() -> Iterator[Readers]:
    with ExitStack() as stack:
        yield Readers(stack)


def wait_for_news(streams: Iterable[StreamReader], since_seconds: float) -> None:
    """Wait until each of the streams has gone on, or has ended, since a moment."""
    streams = list(streams)
    deadline = since_seconds + NEWS_SECONDS

    def silent() -> list[str]:
        return [stream.name for stream in streams if not stream.has_news_since(since_seconds)]

    while silent() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert silent() == [], f"without news {NEWS_SECONDS:g} s after the waking"
