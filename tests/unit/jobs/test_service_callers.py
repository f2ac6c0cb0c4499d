"""What the job service promises each of several callers."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from hidream_grpc.errors import CallerQueueFullError, CallerQuotaError, JobNotFoundError, QueueFullError
from hidream_grpc.jobs.job import CancelReason, JobState
from tests.unit.jobs.service_bench import LIMITS, Bench, bench_in, draw, submission, until

PIXEL_STEPS = submission().parameters.pixel_steps


def limited(directory: Path, **limits: Any) -> AbstractAsyncContextManager[Bench]:
    return bench_in(directory, limits=dataclasses.replace(LIMITS, **limits))


async def test_a_caller_whose_share_of_the_queue_is_used_up_is_refused_and_others_are_not(
    tmp_path: Path,
) -> None:
    async with limited(tmp_path, max_queued_jobs_per_caller=1, max_running_jobs=1) as bench:
        await bench.submit(submission("r0", caller="carol"))
        running = await bench.take()
        await bench.submit(submission("r1", caller="alice"))
        with pytest.raises(CallerQueueFullError) as refused:
            await bench.submit(submission("r2", caller="alice"))
        assert (refused.value.caller, refused.value.max_queued_jobs_per_caller) == ("alice", 1)
        assert refused.value.retry_after_seconds > 0
        await bench.submit(submission("r2", caller="bob"))
        draw(running)
        assert (await bench.take()).request_id == "r1"
        await bench.submit(submission("r3", caller="alice"))


async def test_a_caller_with_as_many_running_jobs_as_may_waits_until_one_of_them_ends(tmp_path: Path) -> None:
    async with limited(tmp_path, max_running_jobs_per_caller=1) as bench:
        first, second = [await bench.submit(submission(f"r{n}", caller="alice")) for n in range(2)]
        other = await bench.submit(submission("r2", caller="bob"))
        running = await bench.take()
        assert running.job_id == first.job_id
        assert (await bench.take()).job_id == other.job_id
        assert await bench.num_queued() >= 1
        draw(running)
        assert (await bench.take()).job_id == second.job_id


@pytest.mark.parametrize("is_started", [True, False])
async def test_a_cancelled_job_makes_room_for_the_next_of_its_caller(
    is_started: bool, tmp_path: Path
) -> None:
    async with limited(tmp_path, max_running_jobs_per_caller=1) as bench:
        first, second = [await bench.submit(submission(f"r{n}", caller="alice")) for n in range(2)]
        if is_started:
            await bench.take()
        await bench.service.cancel(None, first.job_id, CancelReason.REQUESTED)
        assert (await bench.take()).job_id == second.job_id
        assert await bench.taken() is None


async def test_the_work_of_a_minute_is_counted_when_it_is_accepted_and_once(tmp_path: Path) -> None:
    limits = {"max_pixel_steps_per_minute_per_caller": 2 * PIXEL_STEPS, "max_queued_jobs": 2}
    async with limited(tmp_path, max_running_jobs=1, **limits) as bench:
        await bench.submit(submission("r0", caller="carol"))
        await bench.take()
        job = await bench.submit(submission("r1", caller="alice"))
        await bench.submit(submission("r1", caller="alice"))
        assert bench.service.num_accepted == 2
        await bench.submit(submission("r2", caller="bob"))
        with pytest.raises(QueueFullError):
            await bench.submit(submission("r3", caller="alice"))
        await bench.service.cancel(None, job.job_id, CancelReason.REQUESTED)
        await bench.submit(submission("r4", caller="alice"))
        with pytest.raises(CallerQuotaError) as refused:
            await bench.submit(submission("r5", caller="alice"))
        assert (refused.value.caller, refused.value.pixel_steps) == ("alice", PIXEL_STEPS)
        # A retry costs nothing, whatever is left.
        await bench.submit(submission("r4", caller="alice"))


async def test_two_owners_may_use_the_same_request_id(bench: Bench) -> None:
    alices, bobs = [
        await bench.submit(submission("mine", caller=name), owner=name) for name in ("alice", "bob")
    ]
    assert alices.job_id != bobs.job_id
    assert (alices.owner, bobs.owner) == ("alice", "bob")
    again = await bench.submit(submission("mine", caller="bob"), owner="bob")
    assert again.job_id == bobs.job_id


async def test_a_job_of_another_owner_is_not_there(bench: Bench) -> None:
    job = await bench.submit(submission(), owner="alice")
    for call in (
        bench.service.get("bob", job.job_id),
        bench.service.cancel("bob", job.job_id, CancelReason.REQUESTED),
        bench.service.delete("bob", job.job_id),
        anext(bench.service.follow("bob", job.job_id)),
    ):
        with pytest.raises(JobNotFoundError):
            await call
    assert (await bench.service.list("bob", (), {}, 10, "")).jobs == ()
    await bench.run()
    await until(lambda: bench.service.num_ended(JobState.SUCCEEDED) == 1)
