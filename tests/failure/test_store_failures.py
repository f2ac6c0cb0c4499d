"""The database, or the way to it, fails at the worst moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hidream.v1 import job_pb2
from tests.failure.faulty_servers import FaultyServer, server_on_postgres, servers_on_postgres
from tests.failure.readers import readers
from tests.support.job_calls import LONG_STEPS, Stub, cancel, drawn, get
from tests.support.live_server import wait_until
from tests.support.postgres import PostgresServer

GRACE_SECONDS = 1.0
END_SECONDS = GRACE_SECONDS + 5.0
"""A server ends so long after SIGTERM, whatever does not answer; and half as much again on busy cores."""


OUTAGE_SECONDS = 1.25
"""Not a multiple of the half second after which servers try again: others come first."""


@contextmanager
def cut_for_a_moment(server: FaultyServer) -> Iterator[None]:
    """Reset all connections to the database now; they can be made again a little later."""
    server.store.cut()
    timer = threading.Timer(OUTAGE_SECONDS, server.store.heal)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.parametrize(
    "way",
    [
        "CancelJob",
        *(
            pytest.param(way, marks=pytest.mark.long)
            for way in ("its deadline passes", "CancelJob twice", "its caller leaves")
        ),
    ],
)
def test_a_job_that_is_stopped_while_the_database_fails_is_cancelled(
    way: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    with (
        # Nobody else may end the job for want of a lease.
        servers_on_postgres(postgres, tmp_path, ("one",), "--lease-seconds", "15") as (server,),
        server.live.stub() as stub,
        readers() as streams,
    ):
        spec: dict[str, Any] = {"width": 256, "height": 256, "num_inference_steps": LONG_STEPS}
        timeout = 8.0 if way == "its deadline passes" else None
        is_attached = not way.startswith("CancelJob")
        drawing = streams.generate(stub, timeout=timeout, detached=not is_attached, **spec)
        drawing.wait_for("progress")
        job_id = drawing.received[0].message.job_id
        # The transaction that ends the job takes longer than what asks for it: the cut meets it.
        server.store.delay(to_upstream_seconds=0.1)
        if way == "its caller leaves":
            drawing.close()
        elif way == "its deadline passes":
            drawing.wait_for_end()
        else:
            cancel(stub, job_id)
        wait_until(lambda: is_asked_to_stop(postgres, server, job_id), 60, "the job is asked to stop")
        with cut_for_a_moment(server):
            if way == "CancelJob twice":
                # Again as soon as the database answers.
                wait_until(lambda: has_cancelled(stub, job_id), 60, "the job is asked to stop again")
        wait_until(lambda: get(stub, job_id).HasField("end_time"), 60, "the job ends")
        assert get(stub, job_id).state == job_pb2.JOB_STATE_CANCELLED
        assert drawn(stub).state == job_pb2.JOB_STATE_SUCCEEDED


def is_asked_to_stop(postgres: PostgresServer, server: FaultyServer, job_id: str) -> bool:
    database = server.role.rpartition("_")[0]
    query = f"SELECT count(cancel_reason) FROM jobs WHERE job_id = '{job_id}';"
    return postgres.query(query, f"/{database}") == [["1"]]


def has_cancelled(stub: Stub, job_id: str) -> bool:
    try:
        cancel(stub, job_id)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        return False
    return True


@pytest.mark.parametrize("work", [pytest.param("idle", marks=pytest.mark.long), "at work"])
def test_a_server_whose_database_says_nothing_ends_within_its_grace_and_a_few_seconds(
    work: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    with (
        servers_on_postgres(postgres, tmp_path, ("one",), "--grace-seconds", str(GRACE_SECONDS)) as (server,),
        server.live.stub() as stub,
        readers() as streams,
    ):
        if work == "at work":
            drawing = streams.generate(stub, width=256, height=256, num_inference_steps=LONG_STEPS)
            drawing.wait_for("progress")
        server.store.silence()
        server.live.process.send_signal(signal.SIGTERM)
        server.live.process.wait(1.5 * END_SECONDS)
        assert server.live.process.returncode == 0


def test_a_job_that_ends_while_the_database_fails_succeeds_once(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        first, second = (
            stack.enter_context(server_on_postgres(postgres, url, tmp_path, name))
            for name in ("first", "second")
        )
        one, other = (stack.enter_context(server.live.stub()) for server in (first, second))
        streams = stack.enter_context(readers())
        with second.paused():
            drawing = streams.generate(one, width=64, height=64, num_inference_steps=30)
            drawing.wait_for("progress")
        job_id = drawing.received[0].message.job_id
        elsewhere = streams.watch(other, job_id)
        first.store.cut()
        # Until the other replica has taken the job over, and has ended it.
        elsewhere.wait_for_end()
        first.store.heal()
        for stream in (drawing, elsewhere):
            stream.wait_for_end()
            assert stream.kinds[-1] == "succeeded"
            assert stream.events[-1].succeeded.job == get(one, job_id)
        assert get(one, job_id) == get(other, job_id)
