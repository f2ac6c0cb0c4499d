"""A row that this version of the service cannot read, as another version or a hand may have left it."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import job_pb2
from tests.failure.faulty_servers import FaultyServer, servers_on_postgres
from tests.failure.readers import NEWS_SECONDS, StreamReader, readers
from tests.support.job_calls import Stub, cancel, drawn, get, listed, running, submit, wait_for_state
from tests.support.live_server import wait_until
from tests.support.postgres import PostgresServer

CHANGES = {
    "an unknown state": "state = 'PAUSED'",
    "a broken progress document": "progress_document = '{\"stage\": '",
    "a broken submission": "submission = '[]'",
}
BROKEN_DOCUMENTS = ("a broken progress document", "a broken submission")


def error_id_of(stub: Stub, job_id: str) -> str:
    """The id of the internal error that a job ended with, or that a call about it answers; empty: none."""
    try:
        job = get(stub, job_id)
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
    else:
        status = job.error if job.state == job_pb2.JOB_STATE_FAILED else None
    if status is None or status.code != code_pb2.INTERNAL:
        return ""
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.metadata["error_id"]


def end_of(stream: StreamReader) -> str:
    stream.wait_for_end()
    if stream.code == grpc.StatusCode.OK:
        status = stream.events[-1].failed.status
        return code_pb2.Code.Name(status.code)  # OK where the job has not failed
    assert stream.code is not None
    return stream.code.name


@pytest.mark.parametrize(
    "change",
    ["an unknown state", *(pytest.param(change, marks=pytest.mark.long) for change in BROKEN_DOCUMENTS)],
)
def test_a_waiting_job_whose_row_cannot_be_read_fails_alone(
    change: str, postgres: PostgresServer, replicas: tuple[list[FaultyServer], list[Stub]]
) -> None:
    servers, stubs = replicas
    with readers() as streams:
        # Both replicas have work for as long as it takes.
        held = [running(stub) for stub in stubs]
        bad, good = (submit(stubs[0]).job_id for _ in range(2))
        watching = streams.watch(stubs[0], bad)
        watching.wait_for("queued")
        spoil(postgres, servers[0], bad, change)
        for job_id in held:
            cancel(stubs[0], job_id)
        wait_for_state(stubs[0], good, job_pb2.JOB_STATE_SUCCEEDED)
        for stub in stubs:
            wait_until(lambda stub=stub: error_id_of(stub, bad) != "", NEWS_SECONDS, "it has an error id")  # type: ignore[misc]
        assert error_id_of(stubs[0], bad) in servers[0].live.log + servers[1].live.log
        assert end_of(watching) == "INTERNAL"
        all_serve(servers, stubs, good)


@pytest.mark.parametrize(
    "change",
    [
        "a broken progress document",
        *(pytest.param(c, marks=pytest.mark.long) for c in ("an unknown state", "a broken submission")),
    ],
)
def test_a_running_job_whose_row_cannot_be_read_ends_and_disturbs_no_other(
    change: str, postgres: PostgresServer, replicas: tuple[list[FaultyServer], list[Stub]]
) -> None:
    servers, stubs = replicas
    with readers() as streams:
        held, bad = (running(stub, width=64, height=64, num_inference_steps=35) for stub in stubs)
        watching = [streams.watch(stub, bad, f"WatchJob at {n}") for n, stub in enumerate(stubs)]
        for stream in watching:
            stream.wait_for("progress")
        spoil(postgres, servers[0], bad, change)
        # What its replica writes may mend the row.
        ends = {end_of(stream) for stream in watching}
        assert ends in ({"INTERNAL"}, {"OK"})
        wait_for_state(stubs[0], held, job_pb2.JOB_STATE_SUCCEEDED)
        all_serve(servers, stubs, held)


@pytest.fixture(scope="module")
def replicas(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[list[FaultyServer], list[Stub]]]:
    """Two that generate one job at a time each; every test shows that they serve after it."""
    folder = tmp_path_factory.mktemp("replicas")
    flags = ("--max-running-jobs", "1", "--grace-seconds", "1")
    with (
        servers_on_postgres(postgres, folder, ("first", "second"), *flags) as servers,
        servers[0].live.stub() as one,
        servers[1].live.stub() as other,
    ):
        yield servers, [one, other]


def spoil(postgres: PostgresServer, server: FaultyServer, job_id: str, change: str) -> None:
    database = server.role.rpartition("_")[0]
    postgres.execute(f"UPDATE jobs SET {CHANGES[change]} WHERE job_id = '{job_id}';", f"/{database}")


def all_serve(servers: list[FaultyServer], stubs: list[Stub], job_id: str) -> None:
    for server, stub in zip(servers, stubs, strict=True):
        assert server.live.process.poll() is None
        assert job_id in listed(stub)
        assert drawn(stub).state == job_pb2.JOB_STATE_SUCCEEDED
