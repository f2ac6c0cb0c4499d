"""The database goes away under a running service, and comes back: nothing is forgotten or restarted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from hidream.v1 import image_gen_pb2, job_pb2, server_info_pb2
from tests.failure.kill_loop import downloaded, job_request
from tests.support.live_server import running_server, wait_until
from tests.support.postgres import running_postgres

WAIT_SECONDS = 90.0
NUM_STEPS = 60


def test_while_the_database_is_gone_running_jobs_go_on_and_new_ones_are_told_to_come_back(
    tmp_path: Path,
) -> None:
    with running_postgres() as postgres, postgres.database() as url:
        one_rank = ("--devices", "1", "--threads-per-rank", "1", "--max-running-jobs", "1")
        flags = ("--store", url, "--data-dir", str(tmp_path), *one_rank)
        with running_server(*flags, "--metrics-port", "0") as server, server.stub() as stub:
            running = stub.SubmitJob(job_request("running", 1, NUM_STEPS)).job_id
            waiting = stub.SubmitJob(job_request("waiting", 2, 2)).job_id
            watch = stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=running))
            assert any(response.event.HasField("progress") for response in watch)
            postgres.stop()
            with pytest.raises(grpc.RpcError) as caught:
                stub.SubmitJob(job_request("refused", 3, 2))
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            status = rpc_status.from_call(caught.value)
            assert status is not None
            assert status.details[0].Unpack(error_details_pb2.RetryInfo())
            assert server.info().state == server_info_pb2.SERVER_STATE_SERVING
            steps = [response.event.progress.step for response in _until_last_step(watch)]
            assert steps[-1] == NUM_STEPS
            postgres.start()
            assert [response.event for response in watch][-1].HasField("succeeded")

            def is_drawn() -> bool:
                job = stub.GetJob(image_gen_pb2.GetJobRequest(job_id=waiting))
                return job.state == job_pb2.JOB_STATE_SUCCEEDED

            wait_until(is_drawn, WAIT_SECONDS, "the job that waited is drawn")
            job = stub.GetJob(image_gen_pb2.GetJobRequest(job_id=running))
            assert len(downloaded(stub, running)) == job.images[0].size_bytes
            assert job.execution.attempt == 1


def _until_last_step(
    watch: Iterator[image_gen_pb2.WatchJobResponse],
) -> list[image_gen_pb2.WatchJobResponse]:
    responses = []
    for response in watch:
        responses.append(response)
        if response.event.progress.step == NUM_STEPS:
            break
    return responses
