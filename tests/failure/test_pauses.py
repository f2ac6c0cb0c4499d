"""Servers that stand still for a while, as a paused virtual machine does, and wake."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from hidream.v1 import job_pb2
from tests.failure.faulty_servers import (
    LEASE_SECONDS,
    FaultyServer,
    server_on_postgres,
    server_on_sqlite,
    servers_on_postgres,
)
from tests.failure.readers import readers, wait_for_news
from tests.support.job_calls import Stub, get, submission, submit, wait_for_state
from tests.support.live_server import wait_until
from tests.support.postgres import PostgresServer
from tests.support.streams import request

LONG_PAUSE_SECONDS = 3 * LEASE_SECONDS
LOCK_SECONDS = 10.0
"""What a frozen replica holds is free after 5 s; twice as long on busy cores."""


def test_streams_at_a_server_that_slept_through_its_lease_go_on_or_end_soon_after_it_wakes(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with (
        servers_on_postgres(postgres, tmp_path, ("first", "second")) as (first, second),
        first.live.stub() as one,
        second.live.stub() as other,
        readers() as streams,
    ):
        spec = {"width": 64, "height": 64, "num_inference_steps": 60}
        with second.paused():
            # So the first one has both jobs.
            job_id = submit(one, **spec).job_id
            watched = streams.watch(one, job_id, "WatchJob at the one that sleeps")
            drawn = streams.generate(one, "Generate at the one that sleeps", **spec)
            for stream in (watched, drawn):
                stream.wait_for("progress")
        elsewhere = streams.watch(other, job_id, "WatchJob at the other")
        all_jobs = streams.watch_all(one, "WatchJobs at the one that sleeps")
        elsewhere.wait_for("progress")
        with first.paused(LONG_PAUSE_SECONDS):
            elsewhere.wait_for("restarted")
        wake_time = time.monotonic()
        # News for WatchJobs, too.
        submit(other, num_inference_steps=1)
        wait_for_news([watched, drawn, elsewhere, all_jobs], wake_time)
        for stream in (watched, elsewhere):
            assert stream.wait_for_end() == grpc.StatusCode.OK
            assert stream.kinds[-1] == "succeeded"
            sequences = [event.sequence for event in stream.events]
            assert sequences == sorted(set(sequences))
        drawn.wait_for_end()
        for each in {job_id, drawn.received[0].message.job_id}:
            assert get(one, each) == get(other, each)
            assert get(one, each).HasField("end_time")


@pytest.mark.long
def test_streams_at_a_server_that_slept_while_the_job_ended_elsewhere_bring_its_end(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with (
        servers_on_postgres(postgres, tmp_path, ("first", "second")) as (first, second),
        first.live.stub() as one,
        second.live.stub() as other,
        readers() as streams,
    ):
        with second.paused():
            drawn = streams.generate(one, "Generate", width=64, height=64, num_inference_steps=40)
            drawn.wait_for("progress")
            job_id = drawn.received[0].message.job_id
            watched = streams.watch(one, job_id)
            watched.wait_for("progress")
        with first.paused():
            elsewhere = streams.watch(other, job_id, "WatchJob at the other")
            elsewhere.wait_for_end()
        wake_time = time.monotonic()
        wait_for_news([drawn, watched], wake_time)
        for stream in (drawn, watched):
            assert stream.wait_for_end() == grpc.StatusCode.OK
            assert stream.kinds[-1] == "succeeded"
            assert stream.events[-1].succeeded.job == elsewhere.events[-1].succeeded.job


def test_a_job_in_a_file_goes_on_as_if_its_server_had_not_slept(tmp_path: Path) -> None:
    with (
        server_on_sqlite(tmp_path, "--lease-seconds", "1") as server,
        server.live.stub() as stub,
        readers() as streams,
    ):
        drawn = streams.generate(stub, width=64, height=64, num_inference_steps=30)
        drawn.wait_for("progress")
        with server.paused(3.0):
            pass
        assert drawn.wait_for_end() == grpc.StatusCode.OK
        assert "restarted" not in drawn.kinds
        assert drawn.events[-1].succeeded.job.execution.attempt == 1


@pytest.mark.long
@pytest.mark.parametrize("rest", ["sleeps while", "sleeps after"])
def test_a_job_goes_on_when_one_of_its_two_callers_leaves_and_the_others_replica_sleeps(
    rest: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    message = request(num_inference_steps=80, width=128, height=128, request_id="tried-again")
    with (
        servers_on_postgres(postgres, tmp_path, ("first", "second"), "--lease-seconds", "10") as (
            first,
            second,
        ),
        first.live.stub() as one,
        second.live.stub() as other,
        readers() as streams,
    ):
        stays = streams.read("who stays", one.Generate(message))
        leaves = streams.read("who leaves", other.Generate(message))
        for stream in (stays, leaves):
            stream.wait_for("progress")
        if rest == "sleeps while":
            with first.paused(1.0):
                leaves.close()
        else:
            leaves.close()
            with first.paused(1.0):
                pass
        assert stays.wait_for_end() == grpc.StatusCode.OK
        assert stays.kinds[-1] == "succeeded"


def freeze_in_transaction(server: FaultyServer, postgres: PostgresServer, url: str, stub: Stub) -> None:
    """Stop a server while a transaction of its own, which accepts a job, has locks."""

    def holds_locks() -> bool:
        query = (
            "SELECT count(*) FROM pg_stat_activity JOIN pg_locks USING (pid)"
            f" WHERE usename = '{server.role}' AND granted AND state = 'idle in transaction'"
            " AND (locktype = 'advisory' OR mode = 'RowExclusiveLock');"
        )
        return postgres.query(query, url) != [["0"]]

    for _ in range(20):
        # So that a transaction takes long enough to be met.
        server.store.delay(to_upstream_seconds=0.2)
        call: Any = stub.SubmitJob.future(submission(num_inference_steps=1), timeout=60)  # type: ignore[attr-defined]
        wait_until(lambda call=call: holds_locks() or call.done(), 30, "the replica has locks")  # type: ignore[misc]
        # What is on its way may be the end of the transaction.
        server.store.silence()
        if holds_locks():
            server.pause()
            call.cancel()
            return
        server.store.heal()
        call.exception()
    raise AssertionError("the replica was never met within a transaction")


@pytest.mark.long
def test_a_replica_that_freezes_within_a_transaction_stops_no_other_for_long(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    with (
        postgres.database() as url,
        server_on_postgres(postgres, url, tmp_path, "first") as first,
        server_on_postgres(postgres, url, tmp_path, "second") as second,
        first.live.stub() as one,
        second.live.stub() as other,
    ):
        freeze_in_transaction(first, postgres, url, one)
        job = other.SubmitJob(submission(num_inference_steps=1), timeout=LOCK_SECONDS)
        wait_for_state(other, job.job_id, job_pb2.JOB_STATE_SUCCEEDED)
        with server_on_postgres(postgres, url, tmp_path, "third") as third, third.live.stub() as another:
            assert submit(another, num_inference_steps=1).job_id
