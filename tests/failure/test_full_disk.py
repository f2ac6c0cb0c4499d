"""The disk of jobs and images is full under a running service, and has room again."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from hidream.v1 import job_pb2, server_info_pb2
from tests.support.job_calls import (
    WAIT_SECONDS,
    Stub,
    downloaded,
    drawn,
    events,
    get,
    listed,
    refusal,
    running,
    submission,
    submit,
    submit_batch,
    watch,
)
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.small_disks import fill, small_disk
from tests.support.streams import read_until

DISK_BYTES = 8 << 20
NUM_STEPS = 60


@contextmanager
def server_on(disk: Path) -> Iterator[tuple[LiveServer, Stub]]:
    """A server that keeps everything on this disk, and draws one job at a time."""
    flags = ("--data-dir", str(disk), "--devices", "0", "--max-running-jobs", "1", "--grace-seconds", "1")
    with running_server(*flags) as server, server.stub() as stub:
        yield server, stub


def test_on_a_full_disk_new_jobs_are_refused_and_all_that_were_accepted_end_when_there_is_room(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk, server_on(disk) as (server, stub):
        before = drawn(stub)
        image = downloaded(stub, before.job_id)
        runs = running(stub, width=128, height=128, num_inference_steps=NUM_STEPS)
        waits = [submit(stub, seed=seed).job_id for seed in (1, 2)]
        told = watch(stub, runs)
        filling = fill(disk)
        for call in (lambda: submit(stub, seed=3), lambda: submit_batch(stub, submission(), submission())):
            _, retry = refusal(
                call,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                error_details_pb2.QuotaFailure(),
                error_details_pb2.RetryInfo(),
            )
            assert retry.retry_delay.ToNanoseconds() > 0
        # It goes on, and answers for what it has.
        read_until(told, lambda event: event.progress.step == NUM_STEPS)
        assert server.info().state == server_info_pb2.SERVER_STATE_SERVING
        assert get(stub, before.job_id) == before
        assert downloaded(stub, before.job_id) == image
        assert listed(stub) == [*waits[::-1], runs, before.job_id]
        wait_until(lambda: "store the state of job" in server.log, WAIT_SECONDS, "its end has no room either")
        filling.unlink()
        (*_, last) = told
        assert last.event.failed.status.code == code_pb2.RESOURCE_EXHAUSTED
        for job_id in waits:
            job = events(stub, job_id)[-1].succeeded.job
            assert job.execution.attempt == 1
            assert hashlib.sha256(downloaded(stub, job_id)).digest() == job.images[0].sha256
        assert drawn(stub, seed=3).state == job_pb2.JOB_STATE_SUCCEEDED
        # However long it lasts, the log says it once.
        for activity in ("keep snapshots", "store the state"):
            assert len(server.logged_lines(f"cannot {activity} of job {runs}")) == 1


@pytest.mark.long
def test_a_server_that_was_killed_on_a_full_disk_says_so_at_its_start_and_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        with server_on(disk) as (server, stub):
            job_ids = [
                running(stub, width=128, height=128),
                *(submit(stub, seed=seed).job_id for seed in (1, 2)),
            ]
            filling = fill(disk)
            for process in server.descendants():
                process.kill()
            server.process.kill()
        flags = ("--listen", "127.0.0.1:0", "--data-dir", str(disk))
        command = [sys.executable, "-m", "hidream_grpc", "serve", *flags]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS)
        assert refused.returncode == 2
        assert refused.stderr == (
            "hidream-grpc: --data-dir: the job store has no room (database or disk is full)\n"
        )
        filling.unlink()
        with server_on(disk) as (server, stub):
            for job_id in job_ids:
                assert events(stub, job_id)[-1].HasField("succeeded")
                (image,) = get(stub, job_id).images
                assert hashlib.sha256(downloaded(stub, job_id)).digest() == image.sha256
