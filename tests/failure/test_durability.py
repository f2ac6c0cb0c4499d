"""What was acknowledged outlives every process: the whole service is killed, at any moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.failure.kill_loop import LONG_STEPS, KillLoop, downloaded, flags_of, job_request
from tests.live_server import running_server, wait_until

NUM_KILLS = 2


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_no_acknowledged_job_is_lost_or_drawn_twice_when_everything_is_killed(
    store: str, tmp_path: Path
) -> None:
    with flags_of(store, tmp_path) as flags:
        loop = KillLoop(7, NUM_KILLS, flags)
        watcher = loop.run()
    counts = loop.counts
    assert counts.kills == NUM_KILLS
    assert counts.states == {"JOB_STATE_SUCCEEDED": counts.acknowledged}
    assert (counts.lost, counts.drawn_twice, counts.wrong_bytes, counts.sequences_that_fell) == (0, 0, 0, 0)
    assert watcher.has_ended
    assert [event.WhichOneof("event") for event in watcher.events].count("succeeded") == 1
    assert len(watcher.image()) == watcher.events[-1].succeeded.job.images[0].size_bytes


def test_a_job_alone_goes_on_from_its_snapshot_and_gives_the_same_image(tmp_path: Path) -> None:
    flags = ("--data-dir", str(tmp_path), "--devices", "1", "--threads-per-rank", "1")
    request = job_request("alone", 3, LONG_STEPS, side=128)

    with running_server(*flags) as server, server.stub() as stub:
        job_id = stub.SubmitJob(request).job_id

        def has_snapshot() -> bool:
            return (tmp_path / "artifacts" / "snapshots" / job_id).exists()

        wait_until(has_snapshot, 60, "a snapshot is on the disk")
        server.process.kill()
        server.process.wait()
    with running_server(*flags) as server, server.stub() as stub:
        server.wait_until_idle()
        resumed = downloaded(stub, job_id)
        undisturbed = stub.SubmitJob(job_request("again", 3, LONG_STEPS, side=128)).job_id
        server.wait_until_idle()
        assert downloaded(stub, undisturbed) == resumed
