"""A bucket that is slow, or says nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from tests.failure.bucket_proxy import BucketProxy, running_bucket_proxy
from tests.failure.faulty_servers import ONE_THREAD
from tests.failure.readers import readers
from tests.support.job_calls import LONG_STEPS, is_accepted, refusal, submit
from tests.support.live_server import LiveServer, check_health, running_server, wait_until, watched_health
from tests.support.s3_server import BUCKET, S3Server, running_s3_server

PUT_SECONDS = 1.5
Status = health_pb2.HealthCheckResponse.ServingStatus
GRACE_SECONDS = 1.0
END_SECONDS = GRACE_SECONDS + 5.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3_server() as server:
        yield server


@contextmanager
def server_on_bucket(s3: S3Server, folder: Path, *flags: str) -> Iterator[tuple[LiveServer, BucketProxy]]:
    """A server with its jobs in a file, and its images in a bucket behind a proxy."""
    words = ("--data-dir", str(folder), "--artifacts", f"s3://{BUCKET}/{folder.name}", *ONE_THREAD, *flags)
    with (
        running_bucket_proxy(s3) as proxy,
        running_server(*words, environment=proxy.environment) as server,
    ):
        try:
            yield server, proxy
        finally:
            proxy.heal()


def test_a_bucket_that_takes_its_time_delays_no_progress(s3: S3Server, tmp_path: Path) -> None:
    with (
        server_on_bucket(s3, tmp_path) as (server, proxy),
        server.stub() as stub,
        readers() as streams,
    ):
        proxy.delay_puts(PUT_SECONDS)
        stream = streams.generate(stub, width=64, height=64, num_inference_steps=100)
        assert stream.wait_for_end(120) == grpc.StatusCode.OK
        told = [
            received.seconds for received in stream.received if received.message.event.HasField("progress")
        ]
        puts = [put for put in proxy.puts if "/snapshots/" in put.path and put.end_seconds < told[-1]]
        assert puts
        # Progress comes while each snapshot is on its way.
        counts = [sum(put.start_seconds < at < put.end_seconds for at in told) for put in puts]
        assert min(counts) > 1, counts


def test_while_a_bucket_refuses_us_new_jobs_are_told_to_come_back_and_the_running_one_ends_once_it_heals(
    s3: S3Server, tmp_path: Path
) -> None:
    with (
        server_on_bucket(s3, tmp_path, "--store-outage-seconds", "0.5") as (server, proxy),
        server.stub() as stub,
        readers() as streams,
        watched_health(server) as next_status,
    ):
        assert next_status() == Status.SERVING
        stream = streams.generate(stub, width=128, height=128, num_inference_steps=20, request_id="r")
        stream.wait_for("progress")
        proxy.refuse()
        assert next_status() == Status.NOT_SERVING
        assert check_health(server.address, "liveness") == Status.SERVING
        (retry,) = refusal(lambda: submit(stub), grpc.StatusCode.UNAVAILABLE, error_details_pb2.RetryInfo())
        assert retry.retry_delay.seconds > 0
        proxy.heal()
        assert next_status() == Status.SERVING
        assert is_accepted(stub)
        assert stream.wait_for_end(120) == grpc.StatusCode.OK
    assert server.log.count("the artifact store is not available: ") == 1
    assert server.log.count(" WARNING ") == 1, server.log
    assert server.log.count("the artifact store is available again") == 1


def test_a_server_whose_bucket_says_nothing_ends_within_its_grace_and_a_few_seconds(
    s3: S3Server, tmp_path: Path
) -> None:
    with (
        server_on_bucket(s3, tmp_path, "--grace-seconds", str(GRACE_SECONDS)) as (server, proxy),
        server.stub() as stub,
        readers() as streams,
    ):
        stream = streams.generate(stub, width=256, height=256, num_inference_steps=LONG_STEPS)
        stream.wait_for("progress")
        wait_until(lambda: any("/snapshots/" in put.path for put in proxy.puts), 60, "a snapshot is kept")
        proxy.silence()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(1.5 * END_SECONDS)
        assert server.process.returncode == 0
