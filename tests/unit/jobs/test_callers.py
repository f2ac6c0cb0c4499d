"""What the job service promises each of several callers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hidream_grpc.errors import CallerQueueFullError, CallerQuotaError, QueueFullError
from hidream_grpc.jobs.job import CancelReason
from tests.unit.jobs.service_bench import LIMITS, Bench, bench_in, draw, submission

PIXEL_STEPS = submission().parameters.pixel_steps


def limited(directory: Path, **limits: int) -> Bench:
    return bench_in(directory, limits=dataclasses.replace(LIMITS, **limits))


async def test_a_caller_whose_share_of_the_queue_is_used_up_is_refused_and_others_are_not(
    tmp_path: Path,
) -> None:
    bench = limited(tmp_path, max_queued_jobs_per_caller=1)
    bench.service.submit(submission("r1", caller="alice"))
    with pytest.raises(CallerQueueFullError) as refused:
        bench.service.submit(submission("r2", caller="alice"))
    assert (refused.value.caller, refused.value.max_queued_jobs_per_caller) == ("alice", 1)
    assert refused.value.retry_after_seconds > 0
    bench.service.submit(submission("r2", caller="bob"))
    bench.take()
    bench.service.submit(submission("r3", caller="alice"))


async def test_a_caller_with_as_many_running_jobs_as_may_waits_until_one_of_them_ends(tmp_path: Path) -> None:
    bench = limited(tmp_path, max_running_jobs_per_caller=1)
    first, second = (bench.service.submit(submission(f"r{n}", caller="alice")).job_id for n in range(2))
    other = bench.service.submit(submission("r2", caller="bob")).job_id
    running = bench.take()
    assert running.job_id == first
    assert bench.take().job_id == other
    assert bench.service.take() is None
    num_notices = bench.engine.num_notices
    draw(running)
    await bench.end(first)
    # The engine sleeps where it has nothing to take.
    assert bench.engine.num_notices > num_notices
    assert bench.take().job_id == second


@pytest.mark.parametrize("is_started", [True, False])
async def test_a_cancelled_job_makes_room_for_the_next_of_its_caller(
    is_started: bool, tmp_path: Path
) -> None:
    bench = limited(tmp_path, max_running_jobs_per_caller=1)
    first, second = (bench.service.submit(submission(f"r{n}", caller="alice")).job_id for n in range(2))
    if is_started:
        bench.take()
    bench.service.cancel(first, CancelReason.REQUESTED)
    assert bench.take().job_id == second
    assert bench.service.take() is None


async def test_the_work_of_a_minute_is_counted_when_it_is_accepted_and_once(tmp_path: Path) -> None:
    bench = limited(tmp_path, max_pixel_steps_per_minute_per_caller=2 * PIXEL_STEPS, max_queued_jobs=2)
    bench.service.submit(submission("r1", caller="alice"))
    job = bench.service.submit(submission("r1", caller="alice"))
    assert bench.service.num_accepted == 1
    bench.service.submit(submission("r2", caller="bob"))
    with pytest.raises(QueueFullError):
        bench.service.submit(submission("r3", caller="alice"))
    bench.service.cancel(job.job_id, CancelReason.REQUESTED)
    bench.service.submit(submission("r4", caller="alice"))
    bench.take()
    with pytest.raises(CallerQuotaError) as refused:
        bench.service.submit(submission("r5", caller="alice"))
    assert (refused.value.caller, refused.value.pixel_steps) == ("alice", PIXEL_STEPS)
    bench.service.submit(submission("r5", caller="bob"))


async def test_two_owners_may_use_the_same_request_id(bench: Bench) -> None:
    alices, bobs = (
        bench.service.submit(submission("mine", caller=name), owner=name) for name in ("alice", "bob")
    )
    assert alices.job_id != bobs.job_id
    assert (alices.owner, bobs.owner) == ("alice", "bob")
    again = bench.service.submit(submission("mine", caller="bob"), owner="bob")
    assert again.job_id == bobs.job_id
