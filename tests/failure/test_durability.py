"""What was acknowledged outlives every process: the whole service is killed, at any moment."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from hidream.v1 import image_gen_pb2
from tests.failure.kill_loop import LONG_STEPS, KillLoop, downloaded, flags_of, job_request
from tests.support.live_server import running_server, wait_until


@pytest.mark.parametrize(
    ("store", "num_kills"),
    [
        ("sqlite", 1),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("sqlite", 4), ("postgresql", 4))),
    ],
)
def test_no_acknowledged_job_is_lost_or_drawn_twice_when_everything_is_killed(
    store: str, num_kills: int, tmp_path: Path
) -> None:
    with flags_of(store, tmp_path) as flags:
        # A single kill shows no more after a longer wait.
        if num_kills == 1:
            loop = KillLoop(7, num_kills, flags, long_steps=50, max_seconds_to_kill=2.0)
        else:
            loop = KillLoop(7, num_kills, flags)
        watcher = loop.run()
    counts = loop.counts
    assert counts.kills == num_kills
    assert counts.states == {"JOB_STATE_SUCCEEDED": counts.acknowledged}
    assert (counts.lost, counts.drawn_twice, counts.wrong_bytes, counts.sequences_that_fell) == (0, 0, 0, 0)
    assert watcher.has_ended
    assert [event.WhichOneof("event") for event in watcher.events].count("succeeded") == 1
    assert len(watcher.image()) == watcher.events[-1].succeeded.job.images[0].size_bytes


@pytest.mark.long
def test_a_job_alone_goes_on_from_its_snapshot_and_gives_the_same_image(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path), "--devices", "1", "--threads-per-rank", "1")
    request = job_request("alone", 3, LONG_STEPS, side=128)

    with running_server(*flags) as server, server.stub() as stub:
        job_id = stub.SubmitJob(request).job_id
        wait_until(lambda: kept_step(tmp_path, job_id) is not None, 60, "a snapshot is on the disk")
        server.process.kill()
        server.process.wait()
    step = kept_step(tmp_path, job_id)
    with running_server(*flags) as server, server.stub() as stub:
        watch = stub.WatchJob(image_gen_pb2.WatchJobRequest(job_id=job_id))
        restarts = [response.event.restarted for response in watch if response.event.HasField("restarted")]
        assert step is not None
        assert [restart.resumed_from_step >= step for restart in restarts] == [True]
        resumed = downloaded(stub, job_id)
        undisturbed = stub.SubmitJob(job_request("again", 3, LONG_STEPS, side=128)).job_id
        server.wait_until_idle()
        assert downloaded(stub, undisturbed) == resumed


def snapshots_in(data_dir: Path) -> list[Path]:
    return [path for path in (data_dir / "artifacts" / "snapshots").glob("*/*") if path.name.isdecimal()]


def wait_for_snapshot(data_dir: Path, older: set[bytes]) -> set[bytes]:
    """Wait until there are others on the disk than these."""
    found: set[bytes] = set()

    def has_new() -> bool:
        found.update(path.read_bytes() for path in snapshots_in(data_dir))
        return bool(found - older)

    wait_until(has_new, 60, "a snapshot is on the disk")
    return found


@pytest.mark.long
def test_a_snapshot_that_was_altered_on_the_disk_costs_the_steps_and_not_the_image(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path), "--devices", "1", "--threads-per-rank", "1")
    with running_server(*flags) as server, server.stub() as stub:
        undisturbed = stub.SubmitJob(job_request("undisturbed", 3, LONG_STEPS, side=128)).job_id
        server.wait_until_idle()
        image = downloaded(stub, undisturbed)
        job_id = stub.SubmitJob(job_request("altered", 3, LONG_STEPS, side=128)).job_id
        # The row knows of the first before the second is written.
        first = wait_for_snapshot(tmp_path, set())
        wait_for_snapshot(tmp_path, first)
        server.process.kill()
        server.process.wait()
    for snapshot in snapshots_in(tmp_path):
        altered = bytearray(snapshot.read_bytes())
        altered[len(altered) // 2] ^= 1
        snapshot.write_bytes(altered)
    with running_server(*flags) as server, server.stub() as stub:
        server.wait_until_idle()
        assert downloaded(stub, job_id) == image
        warnings = [line for line in server.log_lines if "WARNING" in line]
    (warning,) = [line for line in warnings if job_id in line]
    assert "job starts from its seed: the snapshot is altered or cut" in warning


def kept_step(data_dir: Path, job_id: str) -> int | None:
    """The step after which the job's row says that there is a snapshot."""
    with contextlib.closing(sqlite3.connect(data_dir / "jobs.sqlite")) as connection:
        query = "SELECT json_extract(progress_document, '$.snapshot.step') FROM jobs WHERE job_id = ?"
        step: int | None = connection.execute(query, (job_id,)).fetchone()[0]
    return step
