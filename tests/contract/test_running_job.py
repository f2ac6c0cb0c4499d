"""What a running job tells its readers while its row is being written, and after a kill in between."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from hidream_grpc.engine.requests import RequestStarted, SnapshotTaken, StepFinished
from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.execution.running_job import RunningJob
from hidream_grpc.jobs.job import CancelReason, Job, StoredSnapshot
from hidream_grpc.jobs.watching.events import Body, Cancelled, JobFeed, Progressed, Queued, Restarted, Started
from tests.support.job_stores import StoreDatabase, added, claimed, eventually, new_job, started
from tests.support.job_tools import tools_of
from tests.support.snapshots import packed_snapshot

PARAMETERS = new_job().submission.parameters
SNAPSHOT = packed_snapshot(2, PARAMETERS)

TIMEOUT_SECONDS = 10.0


@pytest.mark.parametrize("starts", [True, False], ids=["starts", "is cancelled before it starts"])
async def test_a_place_that_is_told_while_a_row_is_written_hides_no_event(
    starts: bool, sqlite_database: StoreDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (job,) = await claimed(store)
        feed = JobFeed()
        running = RunningJob(job, feed, tools_of(store, ArtifactStore(tmp_path / "artifacts")))
        feed.publish_first_position()
        write = store.save

        async def save(saved: Job) -> None:
            feed.publish_position(Queued(2))
            await write(saved)

        monkeypatch.setattr(store, "save", save)
        told: list[Body] = []

        async def read() -> None:
            async for event in feed.follow():
                told.append(event.body)
                if isinstance(event.body, Started):
                    running.cancel(CancelReason.REQUESTED)

        reader = asyncio.create_task(read())
        if starts:
            running.receive(RequestStarted())
        else:
            running.cancel(CancelReason.REQUESTED)
        await running.run()
        await reader
    ends = [body for body in told if not isinstance(body, Queued)]
    assert [type(body) for body in ends] == ([Started, Cancelled] if starts else [Cancelled])


@pytest.mark.parametrize(
    ("snapshot", "given", "step"),
    [
        pytest.param(SNAPSHOT, SNAPSHOT, 2, id="newer than the row"),
        pytest.param(SNAPSHOT[:-1], None, 0, id="cut"),
        pytest.param(packed_snapshot(2, PARAMETERS, "0" * 16), None, 0, id="of another checkpoint"),
        pytest.param(
            packed_snapshot(2, msgspec.structs.replace(PARAMETERS, seed=8)), None, 0, id="of another request"
        ),
        pytest.param(b"of another version", None, 0, id="unreadable"),
    ],
)
async def test_a_job_goes_on_from_the_step_of_its_snapshot_whatever_its_row_says(
    snapshot: bytes, given: bytes | None, step: int, sqlite_database: StoreDatabase, tmp_path: Path
) -> None:
    artifacts = ArtifactStore(tmp_path / "artifacts")
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (job,) = await claimed(store)
        # The server was killed when the next snapshot was written, and its row was not.
        await store.save(replace(started(job), snapshot=StoredSnapshot(job.claim_number, 1)))
        await artifacts.write_snapshot(job.job_id, job.claim_number, snapshot)
    async with sqlite_database.opened() as store:
        (job,) = await claimed(store, "replica-2")
        feed = JobFeed()
        running = RunningJob(job, feed, tools_of(store, artifacts))
        request = await running.engine_request()
        assert request is not None
        assert request.snapshot == given
        running.receive(RequestStarted())
        running_task = asyncio.create_task(running.run())
        async for event in feed.follow():
            if isinstance(event.body, Restarted):
                assert (event.body.attempt, event.body.resumed_from_step) == (2, step)
                break
        running.give_back()
        await running_task


async def test_progress_is_told_while_the_store_is_lost_and_the_row_names_the_snapshot_afterwards(
    sqlite_database: StoreDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = ArtifactStore(tmp_path / "artifacts")
    async with sqlite_database.opened() as store:
        await added(store, new_job())
        (job,) = await claimed(store)
        feed = JobFeed()
        running = RunningJob(job, feed, tools_of(store, artifacts))
        running.receive(RequestStarted())
        running_task = asyncio.create_task(running.run())
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async for event in feed.follow():
                if isinstance(event.body, Started):
                    break
        save = store.save

        async def lost(saved: Job) -> None:
            raise StoreUnavailableError(1.0)

        monkeypatch.setattr(store, "save", lost)
        running.receive(StepFinished(1, 0.1))
        running.receive(SnapshotTaken(1, packed_snapshot(1, PARAMETERS)))

        async def is_stored() -> bool:
            return await artifacts.read_snapshot(job.job_id, job.claim_number) is not None

        await eventually(is_stored)
        for _ in range(20):
            await asyncio.sleep(0)
        running.receive(StepFinished(2, 0.1))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async for event in feed.follow():
                if isinstance(event.body, Progressed) and event.body.progress.step == 2:
                    break
        monkeypatch.setattr(store, "save", save)

        async def is_named() -> bool:
            return (await store.get(None, job.job_id)).snapshot == StoredSnapshot(job.claim_number, 1)

        await eventually(is_named)
        running.give_back()
        await running_task
