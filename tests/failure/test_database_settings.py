"""What an administrator does to the database under running servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hidream.v1 import image_gen_pb2, job_pb2
from tests.failure.faulty_servers import FaultyServer, server_on_postgres
from tests.support.job_calls import Stub, get, submission, submit, wait_for_state
from tests.support.live_server import wait_until
from tests.support.postgres import PostgresServer

NUM_SUBMITTERS = 16
NUM_SUBMISSIONS = 64
ANSWER_SECONDS = 20.0


@pytest.mark.long
def test_a_burst_of_jobs_is_accepted_where_transactions_are_serializable(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        database = url.partition("?")[0].rpartition("/")[2]
        postgres.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable';")
        room = ("--max-queued-jobs", str(2 * NUM_SUBMISSIONS))
        stubs = [
            stack.enter_context(
                stack.enter_context(server_on_postgres(postgres, url, tmp_path, name, *room)).live.stub()
            )
            for name in ("first", "second")
        ]
        with ThreadPoolExecutor(NUM_SUBMITTERS) as threads:
            jobs = list(
                threads.map(
                    lambda number: submit(stubs[number % 2], num_inference_steps=1, seed=number),
                    range(NUM_SUBMISSIONS),
                )
            )
        assert len({job.job_id for job in jobs}) == NUM_SUBMISSIONS
        for job in jobs:
            wait_for_state(stubs[0], job.job_id, job_pb2.JOB_STATE_SUCCEEDED)


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return error.code()
    return grpc.StatusCode.OK


@contextmanager
def change_of(kind: str, postgres: PostgresServer, role: str, url: str) -> Iterator[None]:
    """Make a change that keeps the server out, and take it back after the block."""
    tables = "ALL TABLES IN SCHEMA public"
    away, back = {
        "a changed password": (
            f"ALTER ROLE {role} PASSWORD 'another';",
            f"ALTER ROLE {role} PASSWORD 'secret';",
        ),
        "a revoked right": (f"REVOKE ALL ON {tables} FROM {role};", f"GRANT ALL ON {tables} TO {role};"),
        "a renamed table": ("ALTER TABLE jobs RENAME TO away;", "ALTER TABLE away RENAME TO jobs;"),
    }[kind]
    postgres.execute(away, url)
    # A password is asked for when a connection is made.
    postgres.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}';")
    try:
        yield
    finally:
        postgres.execute(back, url)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["a changed password", "a revoked right", "a renamed table"])
def test_a_server_that_the_database_keeps_out_says_so_and_goes_on_when_it_may(
    kind: str, guarded: PostgresServer, tmp_path: Path
) -> None:
    with (
        guarded.database() as url,
        guarded_server(guarded, url, tmp_path) as server,
        server.live.stub() as stub,
    ):
        runs = submit(stub, width=128, height=128, num_inference_steps=80).job_id
        wait_for_state(stub, runs, job_pb2.JOB_STATE_RUNNING)
        waits = submit(stub, num_inference_steps=1).job_id
        with change_of(kind, guarded, server.role, url):
            codes = {name: code_of(call) for name, call in calls_to_store(stub).items()}
            assert set(codes.values()) == {grpc.StatusCode.UNAVAILABLE}, codes
            assert server.live.process.poll() is None
        for job_id in (runs, waits):
            wait_until(lambda: code_of(lambda: get(stub, runs)) == grpc.StatusCode.OK, 60, "it is let in")
            wait_for_state(stub, job_id, job_pb2.JOB_STATE_SUCCEEDED)
        wait_for_state(stub, submit(stub).job_id, job_pb2.JOB_STATE_SUCCEEDED)
        assert server.live.process.poll() is None


def calls_to_store(stub: Stub) -> dict[str, Callable[[], object]]:
    limit: Any = {"timeout": ANSWER_SECONDS}
    return {
        "SubmitJob": lambda: stub.SubmitJob(submission(), **limit),
        "ListJobs": lambda: stub.ListJobs(image_gen_pb2.ListJobsRequest(), **limit),
        "CancelJob": lambda: stub.CancelJob(image_gen_pb2.CancelJobRequest(job_id="none"), **limit),
        "WatchJob": lambda: list(stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id="none"), **limit)),
        "WatchJobs": lambda: list(stub.WatchJobs(image_gen_pb2.WatchJobsRequest(), **limit)),
    }


@contextmanager
def guarded_server(postgres: PostgresServer, url: str, folder: Path) -> Iterator[FaultyServer]:
    """A server with a role that may do no more than it must, and has a password."""
    with server_on_postgres(
        postgres, url, folder, "one", "--max-running-jobs", "1", password="secret"
    ) as server:
        yield server
