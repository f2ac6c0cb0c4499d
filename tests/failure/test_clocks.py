"""Wall clocks that are wrong, or are set while the server runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hidream.v1 import job_pb2
from tests.failure.faulty_servers import FaultyServer, server_on_sqlite, servers_on_postgres
from tests.failure.readers import readers
from tests.support.job_calls import Stub, downloaded, drawn, get, listed
from tests.support.live_server import wait_until
from tests.support.postgres import PostgresServer

HOUR_SECONDS = 3600.0
NUM_RETAINED_JOBS = 3


@pytest.fixture(scope="module")
def one_replica(
    postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FaultyServer, Stub]]:
    """One replica of a database, which keeps few jobs that have ended."""
    folder, flags = tmp_path_factory.mktemp("images"), ("--max-retained-jobs", str(NUM_RETAINED_JOBS))
    with (
        servers_on_postgres(postgres, folder, ("one",), *flags, has_clock=True) as (server,),
        server.live.stub() as stub,
    ):
        yield server, stub


@pytest.fixture
def replica(one_replica: tuple[FaultyServer, Stub]) -> Iterator[tuple[FaultyServer, Stub]]:
    """A replica whose clock is right: the one that all others have before it is set."""
    yield one_replica
    one_replica[0].clock.step_to(0.0)


def wait_until_swept(stub: Stub, *job_ids: str) -> None:
    """Draw one job more than is kept for each of these: retention must have looked when they are gone."""
    for seed, job_id in enumerate(job_ids):
        drawn(stub, num_inference_steps=1, seed=seed)
        wait_until(lambda job_id=job_id: job_id not in listed(stub), 60, "the oldest job goes")  # type: ignore[misc]


@pytest.fixture
def server_on_file(tmp_path: Path) -> Iterator[tuple[FaultyServer, Stub]]:
    """One server with its jobs in a file."""
    flags = ("--max-retained-jobs", str(NUM_RETAINED_JOBS))
    with server_on_sqlite(tmp_path, *flags, has_clock=True) as server, server.live.stub() as stub:
        yield server, stub


@pytest.fixture
def server_and_stub(request: pytest.FixtureRequest) -> tuple[FaultyServer, Stub]:
    chosen: tuple[FaultyServer, Stub] = request.getfixturevalue(request.param)
    return chosen


on_each_store = pytest.mark.parametrize(
    "server_and_stub", [pytest.param("server_on_file", marks=pytest.mark.long), "replica"], indirect=True
)


@on_each_store
def test_a_clock_that_is_set_two_hours_ahead_removes_no_images(
    server_and_stub: tuple[FaultyServer, Stub],
) -> None:
    server, stub = server_and_stub
    oldest, older, kept = (drawn(stub, num_inference_steps=1, seed=seed) for seed in range(3))
    image = downloaded(stub, kept.job_id)
    server.clock.step_to(2 * HOUR_SECONDS)
    wait_until_swept(stub, oldest.job_id, older.job_id)
    assert get(stub, kept.job_id) == kept
    assert downloaded(stub, kept.job_id) == image


def test_what_was_drawn_under_a_clock_two_hours_behind_stays_when_the_clock_is_right(
    replica: tuple[FaultyServer, Stub],
) -> None:
    server, stub = replica
    server.clock.step_to(-2 * HOUR_SECONDS)
    oldest, older, kept = (drawn(stub, num_inference_steps=1, seed=seed) for seed in range(3))
    server.clock.step_to(0.0)
    wait_until_swept(stub, oldest.job_id, older.job_id)
    assert get(stub, kept.job_id) == kept
    assert downloaded(stub, kept.job_id)


def test_a_deadline_is_not_missed_because_the_servers_clock_is_an_hour_behind(
    replica: tuple[FaultyServer, Stub],
) -> None:
    server, stub = replica
    with readers() as streams:
        server.clock.step_to(-HOUR_SECONDS)
        stream = streams.generate(stub, timeout=60.0, num_inference_steps=2)
        assert stream.wait_for_end() == grpc.StatusCode.OK
        assert stream.kinds[-1] == "succeeded"


def test_a_deadline_holds_though_the_servers_clock_is_an_hour_ahead(
    replica: tuple[FaultyServer, Stub],
) -> None:
    server, stub = replica
    with readers() as streams:
        server.clock.step_to(HOUR_SECONDS)
        stream = streams.generate(stub, timeout=3.0, width=256, height=256, num_inference_steps=150)
        stream.wait_for("progress")
        assert stream.wait_for_end() == grpc.StatusCode.DEADLINE_EXCEEDED
        job_id = stream.received[0].message.job_id
        wait_until(lambda: get(stub, job_id).HasField("end_time"), 60, "the job is stopped")
        assert get(stub, job_id).state == job_pb2.JOB_STATE_CANCELLED


@on_each_store
def test_times_of_a_job_follow_one_another_when_the_clock_is_set_under_it(
    server_and_stub: tuple[FaultyServer, Stub],
) -> None:
    server, stub = server_and_stub
    with readers() as streams:
        stream = streams.generate(stub, width=64, height=64, num_inference_steps=30)
        stream.wait_for("started")
        server.clock.step_to(-HOUR_SECONDS)
        stream.wait_for("progress")
        server.clock.step_to(HOUR_SECONDS)
        assert stream.wait_for_end() == grpc.StatusCode.OK
        job = get(stub, stream.received[0].message.job_id)
        create_time, start_time, end_time = (
            time.ToNanoseconds() for time in (job.create_time, job.start_time, job.end_time)
        )
        assert create_time <= start_time <= end_time
        assert all(0 <= seconds < HOUR_SECONDS for seconds in seconds_of(job.timings))
        steps = [event.progress for event in stream.events if event.HasField("progress")]
        estimates = [step.estimated_remaining for step in steps if step.HasField("estimated_remaining")]
        assert all(0 <= each.ToTimedelta().total_seconds() < HOUR_SECONDS for each in estimates)


def seconds_of(timings: job_pb2.JobTimings) -> list[float]:
    return [duration.ToTimedelta().total_seconds() for _, duration in timings.ListFields()]


def test_a_running_job_in_a_file_does_not_notice_that_the_clock_is_set(tmp_path: Path) -> None:
    with (
        server_on_sqlite(tmp_path, has_clock=True) as server,
        server.live.stub() as stub,
        readers() as streams,
    ):
        stream = streams.generate(stub, width=64, height=64, num_inference_steps=40)
        stream.wait_for("progress")
        for seconds in (30.0, -30.0):
            server.clock.step_to(seconds)
            # Whatever looks for work looks now.
            drawn(stub, num_inference_steps=1)
        assert stream.wait_for_end() == grpc.StatusCode.OK
        assert "restarted" not in stream.kinds
        assert stream.kinds.count("started") == 1
        assert stream.events[-1].succeeded.job.execution.attempt == 1
