"""A row that this version of the service cannot read, as another version or a hand may have left it."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import job_pb2
from tests.failure.faulty_servers import servers_on_postgres
from tests.failure.readers import NEWS_SECONDS, StreamReader, readers
from tests.job_calls import Stub, cancel, drawn, get, listed, running, submit, wait_for_state
from tests.live_server import wait_until
from tests.postgres import PostgresServer

CHANGES = {
    "an unknown state": "state = 'PAUSED'",
    "a broken run": "run = '{\"stage\": '",
    "a broken submission": "submission = '[]'",
}


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
    stream.wait_for_end(NEWS_SECONDS)
    if stream.code == grpc.StatusCode.OK:
        status = stream.events[-1].failed.status
        return code_pb2.Code.Name(status.code)
    assert stream.code is not None
    return stream.code.name


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_row_that_cannot_be_read_fails_its_job_alone(
    state: str, change: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    names = ("first", "second")
    with (
        servers_on_postgres(postgres, tmp_path, names, "--max-running-jobs", "1") as (first, second),
        first.live.stub() as one,
        second.live.stub() as other,
        readers() as streams,
    ):
        # Both replicas have work for as long as it takes.
        held = [running(one), running(other)] if state == "queued" else [running(one)]
        bad = submit(one).job_id if state == "queued" else running(other)
        good = submit(one).job_id
        watching = streams.watch(one, bad)
        watching.wait_for("queued")
        database = first.role.rpartition("_")[0]
        postgres.execute(f"UPDATE jobs SET {CHANGES[change]} WHERE job_id = '{bad}';", f"/{database}")
        for job_id in held:
            cancel(one, job_id)
        wait_for_state(one, good, job_pb2.JOB_STATE_SUCCEEDED)
        wait_until(lambda: error_id_of(one, bad) != "", NEWS_SECONDS, "the job has an internal error")
        assert error_id_of(one, bad) in first.live.log + second.live.log
        assert end_of(watching) == "INTERNAL"
        for server, stub in ((first, one), (second, other)):
            assert server.live.process.poll() is None
            assert good in listed(stub)
            assert drawn(stub).state == job_pb2.JOB_STATE_SUCCEEDED
