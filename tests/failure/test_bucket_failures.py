"""A bucket that is slow, or says nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from tests.failure.bucket_proxy import BucketProxy, running_bucket_proxy
from tests.failure.faulty_servers import ONE_THREAD
from tests.failure.readers import readers
from tests.support.job_calls import LONG_STEPS
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.s3_server import BUCKET, S3Server, running_s3_server

PUT_SECONDS = 1.5
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
        stream = streams.generate(stub, width=128, height=128, num_inference_steps=LONG_STEPS)
        assert stream.wait_for_end(120) == grpc.StatusCode.OK
        told = [
            received.seconds for received in stream.received if received.message.event.HasField("progress")
        ]
        puts = [put for put in proxy.puts if "/snapshots/" in put.path and put.end_seconds < told[-1]]
        assert puts
        # Progress comes while each snapshot is on its way.
        counts = [sum(put.start_seconds < at < put.end_seconds for at in told) for put in puts]
        assert min(counts) > 1, counts


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
        wait_until(lambda: bool(proxy.puts), 60, "a snapshot is kept")
        proxy.silence()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(1.5 * END_SECONDS)
        assert server.process.returncode == 0
