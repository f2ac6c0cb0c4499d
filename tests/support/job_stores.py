"""Jobs for tests of the store, and the two databases that it runs on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from hidream_grpc.engine.requests import Priority
from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.job import Execution, Job, JobState, StoredImage, Submission, claim_sequence
from hidream_grpc.jobs.store.changes import Change, ChangeKind, Subscription
from hidream_grpc.jobs.store.order import claim_order
from hidream_grpc.jobs.store.records import QueueLimits
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.model.parameters import GenerationParameters

ROOMY = QueueLimits(max_queued_jobs=100_000)
MODEL = "0123456789abcdef"
"""Fingerprint of the model that claims."""
OWNER = "anna"
T = TypeVar("T")


@dataclass(frozen=True)
class StoreDatabase:
    """Where a store keeps its jobs: a SQLite file, or a database of a PostgreSQL server."""

    url: str
    is_file: bool

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[SqlJobStore]:
        store = SqlJobStore(self.url)
        await store.open()
        try:
            yield store
        finally:
            await store.close()


def new_job(
    *,
    owner: str = OWNER,
    caller: str = "host-1",
    request_id: str | None = None,
    prompt: str = "a red circle",
    priority: Priority = Priority.NORMAL,
    labels: Mapping[str, str] | None = None,
    deadline_time: float | None = None,
) -> Job:
    """A job that was just accepted."""
    parameters = GenerationParameters(
        prompt=prompt, width=64, height=32, num_inference_steps=4, guidance_scale=0.1, seed=7
    )
    submission = Submission(parameters, request_id or uuid.uuid4().hex, caller, priority, labels or {})
    return Job(uuid.uuid4().hex, submission, time.time(), owner=owner, deadline_time=deadline_time)


async def added(store: SqlJobStore, *jobs: Job) -> tuple[Job, ...]:
    """Accept jobs whose number is not limited."""
    return await store.add(jobs, ROOMY)


async def queue_order(store: SqlJobStore, max_running_jobs_of_caller: int | None = None) -> list[str]:
    """Ids of the jobs that wait for the model, in the order in which they will be claimed."""
    queued_jobs = await store.waiting_after(0, 1_000)
    waiting = [queued.waiting for queued in queued_jobs if queued.job.model_fingerprint in (MODEL, "")]
    loads = await store.caller_loads(MODEL, max_running_jobs_of_caller)
    return [job.job_id for job in claim_order(waiting, loads)]


async def joined(store: SqlJobStore, replica_id: str) -> None:
    """Register a replica, unless it is registered."""
    if all(record.replica_id != replica_id for record in await store.replicas()):
        await store.join(replica_id, "{}")


async def claimed(
    store: SqlJobStore,
    replica_id: str = "replica-1",
    limit: int = 1,
    max_running_jobs_of_caller: int | None = None,
) -> tuple[Job, ...]:
    """Claim for a replica that lives until the test removes it."""
    await joined(store, replica_id)
    return await store.claim(replica_id, MODEL, limit, max_running_jobs_of_caller)


def ids(jobs: Iterable[Job]) -> list[str]:
    """In their order."""
    return [job.job_id for job in jobs]


def started(job: Job) -> Job:
    """The job when its replica has begun to draw it."""
    execution = Execution("demo", "FlowMatchLCMScheduler", 3.0, "tp=1")
    sequence = claim_sequence(job.claim_number, 1)
    begun = job.started(execution, time.time()) if job.state is JobState.QUEUED else job
    return replace(begun, started_sequence=sequence, last_sequence=sequence)


def with_image(job: Job, size_bytes: int = 1000) -> Job:
    """The job with one image more."""
    image = StoredImage(
        index=len(job.images),
        width=64,
        height=32,
        seed=7 + len(job.images),
        mime_type="image/png",
        size_bytes=size_bytes,
        sha256=bytes(range(32)),
        first_sequence=job.last_sequence + 1,
        time=time.time(),
        chunk_bytes=size_bytes or 1,
        claim_number=job.claim_number,
    )
    return replace(job.with_image(image, 0.25), last_sequence=job.last_sequence + 1)


def succeeded(job: Job) -> Job:
    """The job when all is done."""
    ended = job.ended(JobState.SUCCEEDED, time.time())
    return replace(ended, last_sequence=job.last_sequence + 1)


async def finished(store: SqlJobStore, job: Job, size_bytes: int = 1000) -> Job:
    """Draw a job that is claimed, to its end."""
    done = succeeded(with_image(started(job), size_bytes))
    await store.save(done)
    return done


async def eventually(attempt: Callable[[], Awaitable[T | None]], timeout_seconds: float = 20.0) -> T:
    """The first result that is there; fail when none is in time."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            if result := await attempt():
                return result
            await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(database: StoreDatabase) -> AsyncIterator[AsyncConnection]:
    """A connection beside the store, that knows nothing of it."""
    engine = create_async_engine(database.url)
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()


async def told(store: SqlJobStore) -> HiDreamError | None:
    """How the store answers a caller now; None when it accepts a job."""
    try:
        await added(store, new_job())
    except HiDreamError as error:
        return error
    return None


async def until(changes: Subscription, kind: ChangeKind, job_id: str = "") -> Change:
    """The next change of this kind; those before it are passed over."""
    async with asyncio.timeout(20.0):
        async for change in changes:
            if (change.kind, change.job_id) == (kind, job_id):
                return change
    raise AssertionError("a subscription is endless")
