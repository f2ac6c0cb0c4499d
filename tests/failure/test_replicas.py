"""Two services on one PostgreSQL and one artifact folder: any of them answers for any job."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, job_pb2
from tests.failure.kill_loop import LONG_STEPS, downloaded, job_request
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.postgres import PostgresServer
from tests.support.streams import follow, is_progress, read_until, request

WAIT_SECONDS = 60.0


@contextmanager
def replicas(postgres: PostgresServer, directory: Path) -> Iterator[tuple[LiveServer, LiveServer]]:
    """Two servers that draw one job at a time each."""
    with postgres.database() as url:
        shared = ("--store", url, "--artifacts", f"file://{directory / 'artifacts'}")
        # Two servers with two threads each on two cores wait for one another.
        one_at_a_time = ("--devices", "1", "--threads-per-rank", "1", "--max-running-jobs", "1")
        flags = (*shared, *one_at_a_time, "--lease-seconds", "1")
        with (
            running_server(*flags, "--grace-seconds", "0.2") as first,
            running_server(*flags, "--grace-seconds", "0.2") as second,
        ):
            yield first, second


@pytest.fixture(scope="module")
def pair(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LiveServer, LiveServer]]:
    """Two replicas that both outlive the test."""
    with replicas(postgres, tmp_path_factory.mktemp("pair")) as servers:
        yield servers


def job_of(stub: image_gen_pb2_grpc.ImageGenStub, job_id: str) -> job_pb2.Job:
    return stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id))


def wait_for_state(
    stub: image_gen_pb2_grpc.ImageGenStub, job_id: str, state: job_pb2.JobState.ValueType
) -> None:
    name = job_pb2.JobState.Name(state)
    wait_until(lambda: job_of(stub, job_id).state == state, WAIT_SECONDS, f"the job is {name}")


def num_ends(server: LiveServer, job_id: str) -> int:
    """How often the server says to have finished the job."""
    return len(re.findall(rf"job succeeded .*job_id={job_id}", server.log))


def test_any_replica_answers_for_any_job_and_none_is_drawn_by_both(
    pair: tuple[LiveServer, LiveServer],
) -> None:
    first, second = pair
    requests = [job_request(f"r{number}", number, 10) for number in range(4)]
    with first.stub() as one, second.stub() as other, ThreadPoolExecutor() as threads:
        jobs = one.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=requests)).jobs
        streams = [
            threads.submit(list, stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job.job_id)))
            for job in jobs
            for stub in (one, other)
        ]
        for number, stream in enumerate(streams):
            events = [response.event for response in stream.result()]
            kinds = [event.WhichOneof("event") for event in events]
            assert kinds[-1] == "succeeded"
            assert "started" in kinds
            sequences = [event.sequence for event in events]
            assert sequences == sorted(set(sequences))
            image = b"".join(event.image_chunk.data for event in events if event.HasField("image_chunk"))
            assert image == downloaded((one, other)[number % 2], jobs[number // 2].job_id)
        listed = other.ListJobs(image_gen_pb2.ListJobsRequest()).jobs
        assert {job.job_id for job in listed} >= {job.job_id for job in jobs}
        wait_until(
            lambda: all(num_ends(first, job.job_id) + num_ends(second, job.job_id) == 1 for job in jobs),
            WAIT_SECONDS,
            "each job ended once",
        )
        # Both have drawn.
        assert all(any(num_ends(server, job.job_id) for job in jobs) for server in (first, second))


def test_a_replica_cancels_what_the_other_draws_and_its_progress_is_told_by_both(
    pair: tuple[LiveServer, LiveServer],
) -> None:
    first, second = pair
    with first.stub() as one, second.stub() as other:
        job_id = one.SubmitJob(job_request("long", 1, LONG_STEPS, side=256)).job_id
        for stub in (one, other):
            watch = stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id))
            assert any(response.event.HasField("progress") for response in watch)
        for stub in (one, other):
            stub.CancelJob(image_gen_pb2.CancelJobRequest(job_id=job_id))
        for stub in (one, other):
            wait_for_state(stub, job_id, job_pb2.JOB_STATE_CANCELLED)
        assert num_ends(first, job_id) + num_ends(second, job_id) == 0


def test_a_caller_that_tries_again_at_the_other_replica_keeps_its_job(
    pair: tuple[LiveServer, LiveServer],
) -> None:
    first, second = pair
    message = request(num_inference_steps=25, width=64, height=64, request_id="tried-again")
    with first.stub() as one, second.stub() as other:
        lost, again = one.Generate(message), other.Generate(message)
        assert read_until(lost, is_progress)[-1].job_id == read_until(again, is_progress)[-1].job_id
        lost.cancel()
        stream = follow(again)
        assert stream.kinds[-1] == "succeeded"
        assert stream.job.execution.attempt == 1
        # Without one that tries again it stops.
        alone = one.Generate(request(num_inference_steps=LONG_STEPS, width=256, height=256))
        job_id = read_until(alone, is_progress)[-1].job_id
        alone.cancel()
        wait_for_state(other, job_id, job_pb2.JOB_STATE_CANCELLED)


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGTERM, id="drained", marks=pytest.mark.long),
    ],
)
def test_what_a_replica_leaves_is_finished_by_the_other(
    death: signal.Signals, postgres: PostgresServer, tmp_path: Path
) -> None:
    # The third waits until one of the others has ended.
    requests = [job_request(f"r{number}", number, num_steps) for number, num_steps in enumerate((40, 40, 4))]
    with replicas(postgres, tmp_path) as (first, second), second.stub() as stub, first.stub() as dying:
        jobs = dying.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=requests)).jobs
        snapshots = tmp_path / "artifacts" / "snapshots"
        wait_until(
            lambda: len({file.parent for file in snapshots.glob("*/1")}) >= 2,
            WAIT_SECONDS,
            "both draw, and have written snapshots",
        )
        first.process.send_signal(death)
        first.process.wait()
        for job in jobs:
            wait_for_state(stub, job.job_id, job_pb2.JOB_STATE_SUCCEEDED)
        ended = [job_of(stub, job.job_id) for job in jobs]
        assert any(job.execution.attempt > 1 for job in ended)
        assert all(num_ends(first, job.job_id) + num_ends(second, job.job_id) == 1 for job in jobs)
        assert all(len(downloaded(stub, job.job_id)) == job.images[0].size_bytes for job in ended)
