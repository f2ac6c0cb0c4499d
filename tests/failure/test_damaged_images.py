"""Files of images that are removed, cut or altered behind the server's back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest

from hidream.v1 import image_gen_pb2
from tests.failure.faulty_servers import FaultyServer, server_on_sqlite
from tests.support.job_calls import WAIT_SECONDS, Stub, delete, drawn, get
from tests.support.streams import request

MAX_MESSAGES = 1000
"""More than an image of 64×64 has pieces: a stream that brings as many has no end."""
CHUNK_BYTES = 1024

Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "altered": lambda path: path.write_bytes(path.read_bytes()[:-20] + bytes(20)),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    with server_on_sqlite(tmp_path_factory.mktemp("damaged"), "--chunk-bytes", str(CHUNK_BYTES)) as server:
        yield server


@pytest.fixture
def stub(server: FaultyServer) -> Iterator[Stub]:
    with server.live.stub() as stub:
        yield stub


def read_code(call: Any) -> grpc.StatusCode:
    """The code that a stream ends with, which it must."""
    num_messages = 0
    try:
        for _ in islice(call, MAX_MESSAGES):
            num_messages += 1
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code()
    assert num_messages < MAX_MESSAGES, "the stream has no end"
    return grpc.StatusCode.OK


def drawing(stub: Stub, request_id: str) -> Any:
    """A picture of several pieces; a second time, with the same id, the one that was drawn."""
    message = request("a red circle", request_id=request_id, width=64, height=64, num_inference_steps=2)
    return stub.Generate(message, timeout=WAIT_SECONDS)


def read_image(stub: Stub, call: str, job_id: str, request_id: str) -> grpc.StatusCode:
    """Read the image of a job that has ended by one of the calls that bring it."""
    stream: Any
    match call:
        case "WatchJob":
            stream = stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id), timeout=WAIT_SECONDS)
        case "DownloadImage":
            message = image_gen_pb2.DownloadImageRequest(job_id=job_id)
            stream = stub.DownloadImage(message, timeout=WAIT_SECONDS)
        case _:
            stream = drawing(stub, request_id)
    return read_code(stream)


def stored_image(server: FaultyServer, job_id: str) -> Path:
    """The file of the one image of a job, whatever its name is."""
    folders = [path for path in artifacts_of(server).rglob("*") if path.is_file() and job_id in path.parts]
    (path,) = [path for path in folders if "images" in path.parts]
    return path


def artifacts_of(server: FaultyServer) -> Path:
    words = server.live.process.args
    assert isinstance(words, list)
    return Path(str(words[words.index("--data-dir") + 1])) / "artifacts"


@pytest.mark.parametrize(
    ("damage", "call"),
    [
        # Each damage by one call, and one damage by each call, are enough by default.
        pytest.param(
            damage, call, marks=() if damage == "cut" or call == "DownloadImage" else pytest.mark.long
        )
        for damage in DAMAGES
        for call in ("WatchJob", "Generate", "DownloadImage")
    ],
)
def test_an_image_that_is_not_as_it_was_stored_is_lost_data(
    damage: str, call: str, server: FaultyServer, stub: Stub
) -> None:
    request_id = f"{damage}-{call}"
    job = get(stub, list(drawing(stub, request_id))[-1].job_id)
    assert read_image(stub, call, job.job_id, request_id) == grpc.StatusCode.OK
    DAMAGES[damage](stored_image(server, job.job_id))
    assert read_image(stub, call, job.job_id, request_id) == grpc.StatusCode.DATA_LOSS
    # It is said each time, and the job stays what it is.
    assert read_image(stub, call, job.job_id, request_id) == grpc.StatusCode.DATA_LOSS
    assert get(stub, job.job_id) == job


@pytest.mark.parametrize("call", ["WatchJob", "DownloadImage"])
def test_a_damaged_image_of_a_deleted_job_is_not_found(call: str, server: FaultyServer, stub: Stub) -> None:
    job = drawn(stub)
    stored_image(server, job.job_id).write_bytes(b"")
    delete(stub, job.job_id)
    assert read_image(stub, call, job.job_id, "") == grpc.StatusCode.NOT_FOUND
