"""What a job store keeps when its process ends or is killed, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest

from hidream_grpc.errors import (
    StoreInUseError,
)
from hidream_grpc.jobs.job import Job, JobState
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.contract import acknowledged_jobs
from tests.support.job_stores import (
    OWNER,
    StoreDatabase,
    added,
    claimed,
    finished,
    new_job,
    started,
    told,
    with_image,
)

MAX_LINES_BEFORE_A_KILL = 60


async def test_everything_is_there_after_a_restart(database: StoreDatabase) -> None:
    async with database.opened() as store:
        await added(store, *(new_job(labels={"a": "b"}) for _ in range(4)))
        done, running, untouched = await claimed(store, limit=3)
        done = await finished(store, done)
        running = with_image(started(running))
        await store.save(running)
        jobs = (await store.list(OWNER)).jobs
        token = (await store.list(OWNER, page_size=2)).next_page_token
    async with database.opened() as store:
        assert (await store.list(OWNER, labels={"a": "b"})).jobs == jobs
        assert (await store.list(OWNER, page_size=2, page_token=token)).jobs == jobs[2:]
        assert running in jobs
        assert done in jobs
        assert (await store.get(None, untouched.job_id)).state is JobState.QUEUED


async def test_what_ran_when_the_only_process_died_is_claimed_at_once(sqlite_database: StoreDatabase) -> None:
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (job,) = await claimed(store)
        await store.save(started(job))
    async with sqlite_database.opened() as store:
        (again,) = await claimed(store, "replica-2")
        assert (again.job_id, again.state, again.claim_number) == (job.job_id, JobState.RUNNING, 2)


async def test_two_servers_never_share_one_file(sqlite_database: StoreDatabase) -> None:
    async with sqlite_database.opened():
        with pytest.raises(StoreInUseError) as caught:
            async with sqlite_database.opened():
                pass
    assert str(caught.value).endswith("jobs.sqlite is in use by another server")
    async with sqlite_database.opened() as store:
        assert await told(store) is None


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
async def test_after_sigkill_every_acknowledged_job_is_there(
    database: StoreDatabase, seed: int, is_long: bool
) -> None:
    generator = random.Random(seed)
    acknowledged: dict[str, str] = {}
    num_kills = 4 if is_long else 2
    for _ in range(num_kills):
        num_lines = generator.randint(1, MAX_LINES_BEFORE_A_KILL)
        lines = await asyncio.to_thread(acknowledged_until_killed, database.url, num_lines)
        acknowledged.update({job_id: word for word, job_id in lines})
        async with database.opened() as store:
            kept = await kept_jobs(store)
            assert acknowledged.keys() <= kept.keys()
            assert all(
                kept[job_id].state is JobState.SUCCEEDED
                for job_id, word in acknowledged.items()
                if word == "succeeded"
            )
            assert_whole(kept)
    assert len(acknowledged) >= num_kills


def acknowledged_until_killed(url: str, num_lines: int) -> list[tuple[str, str]]:
    """What a process says of the jobs that it adds, when it is killed after so many lines."""
    command = [sys.executable, "-m", acknowledged_jobs.__name__, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(num_lines)]
        process.send_signal(signal.SIGKILL)
        # What was said before the kill counts, too.
        lines += process.stdout.read().splitlines(keepends=True)
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(word, job_id) for word, job_id in words]


async def kept_jobs(store: SqlJobStore) -> dict[str, Job]:
    """All jobs, over all pages."""
    page = await store.list(OWNER, page_size=50)
    kept = list(page.jobs)
    while page.next_page_token:
        page = await store.list(OWNER, page_size=50, page_token=page.next_page_token)
        kept += page.jobs
    return {job.job_id: job for job in kept}


def assert_whole(kept: dict[str, Job]) -> None:
    """No batch is there in part, and a job has its image if and only if it has succeeded."""
    batches = Counter(
        (job.submission.labels["batch"], job.submission.labels["size"]) for job in kept.values()
    )
    assert {int(size) for (_, size), count in batches.items() if count != int(size)} == set()
    for job in kept.values():
        assert (job.state is JobState.SUCCEEDED) == (len(job.images) == 1)
