"""The bytes of finished images, from any offset, over connections that break."""

from __future__ import annotations

import hashlib
import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import pytest
from google.rpc import error_details_pb2
from PIL import Image

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from tests.e2e.conftest import NarrowServer
from tests.support.job_calls import (
    Stub,
    bad_fields,
    cancel,
    download,
    downloaded,
    drawn,
    events,
    get,
    not_found,
    refusal,
    running,
    submit,
    wait_for_state,
)
from tests.support.live_server import LiveServer

CONNECTION_BYTES = 8 * 1024
"""What the cutter lets through before it cuts a connection: some pieces of the narrow server."""


def test_the_pieces_of_an_image_follow_each_other_and_each_says_of_what_it_is_one(
    narrow: Stub, narrow_server: NarrowServer
) -> None:
    job = drawn(narrow, num_images=2, seed=9, output_format=image_pb2.OUTPUT_FORMAT_JPEG)
    for image in job.images:
        chunks = download(narrow, job.job_id, image.index)
        assert len(chunks) > 1
        offset = 0
        for chunk in chunks:
            assert chunk.image == image
            assert chunk.offset == offset
            assert 0 < len(chunk.data) <= narrow_server.chunk_bytes
            offset += len(chunk.data)
        data = b"".join(chunk.data for chunk in chunks)
        assert (len(data), hashlib.sha256(data).digest()) == (image.size_bytes, image.sha256)
        told = [event.image_chunk for event in events(narrow, job.job_id) if event.HasField("image_chunk")]
        assert data == b"".join(chunk.data for chunk in told if chunk.image == image)


def test_a_download_begins_at_the_byte_that_was_asked_for(narrow: Stub, narrow_server: NarrowServer) -> None:
    job = drawn(narrow)
    (image,) = job.images
    whole = downloaded(narrow, job.job_id)
    step = narrow_server.chunk_bytes
    for offset in (1, step - 1, step, step + 1, image.size_bytes // 2, image.size_bytes - 1):
        chunks = download(narrow, job.job_id, offset=offset)
        assert chunks[0].offset == offset
        assert b"".join(chunk.data for chunk in chunks) == whole[offset:]
    # Who has it all gets nothing more, and no error.
    assert download(narrow, job.job_id, offset=image.size_bytes) == []


def test_an_offset_beyond_the_image_is_out_of_range(stub: Stub) -> None:
    job = drawn(stub)
    size_bytes = job.images[0].size_bytes
    for offset in (size_bytes + 1, 2**63 - 1):
        (bad,) = refusal(
            lambda offset=offset: download(stub, job.job_id, offset=offset),  # type: ignore[misc]
            grpc.StatusCode.OUT_OF_RANGE,
            error_details_pb2.BadRequest(),
        )
        assert bad.field_violations[0].field == "offset"
        assert str(size_bytes) in bad.field_violations[0].description


def test_an_image_that_its_job_does_not_draw_is_not_found(stub: Stub) -> None:
    job = drawn(stub)
    for index in (1, 2**31 - 1):
        resource = not_found(lambda index=index: download(stub, job.job_id, index))  # type: ignore[misc]
        assert resource.resource_name == job.job_id
    assert set(bad_fields(lambda: download(stub, job.job_id, index=-1))) == {"image_index"}


def test_an_image_that_is_not_finished_is_to_be_watched(narrow: Stub) -> None:
    runs = running(narrow, num_images=2)
    waits = submit(narrow).job_id
    for job_id, index in ((runs, 0), (runs, 1), (waits, 0)):
        failure, resource = refusal(
            lambda job_id=job_id, index=index: download(narrow, job_id, index),  # type: ignore[misc]
            grpc.StatusCode.FAILED_PRECONDITION,
            error_details_pb2.PreconditionFailure(),
            error_details_pb2.ResourceInfo(),
        )
        assert failure.violations[0].subject == resource.resource_name == job_id
    not_found(lambda: download(narrow, runs, index=2))
    # Of a job that ended without it there never will be one.
    cancel(narrow, runs)
    wait_for_state(narrow, runs, job_pb2.JOB_STATE_CANCELLED)
    not_found(lambda: download(narrow, runs))


@pytest.mark.long
def test_a_plain_stub_receives_an_image_of_1024_by_1024(stub: Stub, server: LiveServer) -> None:
    large_job = drawn(stub, width=1024, height=1024, num_inference_steps=1, guidance_scale=1.0)
    chunks = download(stub, large_job.job_id)
    assert max(len(chunk.data) for chunk in chunks) == server.info().limits.chunk_bytes
    data = b"".join(chunk.data for chunk in chunks)
    assert hashlib.sha256(data).digest() == large_job.images[0].sha256
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (1024, 1024)


class Cutter:
    """Passes connections on to a server, and cuts each after so many bytes from there."""

    def __init__(self, address: str, num_bytes: int) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._num_bytes = num_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_cuts = 0

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for pump in (self._pass_on, self._cut):
                thread = threading.Thread(target=pump, args=(client, server))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """What the client says, until either end is shut down."""
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        shut_down(server)

    def _cut(self, client: socket.socket, server: socket.socket) -> None:
        """What the server says, up to the limit."""
        left = self._num_bytes
        with client, server:
            with suppress(OSError):
                while left and (data := server.recv(min(left, 65536))):
                    client.sendall(data)
                    left -= len(data)
            self.num_cuts += left == 0
            shut_down(client)
            shut_down(server)


def shut_down(connection: socket.socket) -> None:
    # The other end may be faster.
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutter(address: str) -> Iterator[Cutter]:
    cutter = Cutter(address, CONNECTION_BYTES)
    try:
        yield cutter
    finally:
        cutter.close()


def test_a_download_goes_on_from_the_bytes_received_however_often_its_connection_breaks(
    narrow: Stub, narrow_server: NarrowServer
) -> None:
    large_job = drawn(narrow, width=512, height=512, num_inference_steps=1, guidance_scale=1.0)
    (image,) = large_job.images
    received = b""
    with (
        cutter(narrow_server.live.address) as connection,
        grpc.insecure_channel(connection.address) as channel,
    ):
        stub = image_gen_pb2_grpc.ImageGenStub(channel)
        while len(received) < image.size_bytes:
            message = image_gen_pb2.DownloadImageRequest(job_id=large_job.job_id, offset=len(received))
            try:
                for response in stub.DownloadImage(message, wait_for_ready=True):
                    assert response.chunk.offset == len(received)
                    received += response.chunk.data
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                assert error.code() == grpc.StatusCode.UNAVAILABLE
        num_cuts = connection.num_cuts
    assert num_cuts >= image.size_bytes // CONNECTION_BYTES > 1
    assert hashlib.sha256(received).digest() == image.sha256


def test_what_was_broken_off_leaves_no_stream_behind(narrow: Stub) -> None:
    job = drawn(narrow)
    for _ in range(20):
        call = narrow.DownloadImage(image_gen_pb2.DownloadImageRequest(job_id=job.job_id))
        next(call)
        call.cancel()
    assert hashlib.sha256(downloaded(narrow, job.job_id)).digest() == job.images[0].sha256
    assert get(narrow, job.job_id) == job
