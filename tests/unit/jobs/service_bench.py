"""The job service on a bench: with a small engine that the test drives, and real stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hidream_grpc.engine.requests import (
    EngineRequest,
    EngineState,
    ImageFinished,
    Priority,
    PromptsEncoded,
    RequestFinished,
    RequestStarted,
    StepFinished,
)
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.job import Execution, Job, JobState, ModelIdentity, Submission
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.jobs.replicas.membership import LiveModel
from hidream_grpc.jobs.retention.retention import RetentionLimits
from hidream_grpc.jobs.service import JobService, StorePolicy
from hidream_grpc.jobs.store.clock import StoreClock
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import (
    Body,
    JobEvent,
)
from hidream_grpc.model.parameters import GenerationParameters
from tests.support.job_stores import MODEL, eventually
from tests.support.passing_clock import PassingClock
from tests.support.snapshots import CHECKPOINT_FINGERPRINT

LIMITS = RequestLimits(
    max_prompt_tokens=128,
    max_prompt_bytes=4096,
    size_multiple=16,
    min_side_pixels=64,
    max_pixels=1024 * 1024,
    max_num_inference_steps=150,
    max_guidance_scale=20.0,
    max_num_images=8,
    max_seed=2**32 - 8,
    max_queued_jobs=3,
    max_running_jobs=2,
    max_streams=10,
    max_request_id_bytes=128,
    max_labels=32,
    max_label_bytes=128,
    max_receive_message_bytes=1024 * 1024,
    chunk_bytes=1000,
    max_preview_side_pixels=128,
)
TOKENIZERS = "0011223344556677"
MODEL_IDENTITY = ModelIdentity("demo", "dev", MODEL)
DEFAULTS = RequestDefaults(width=64, height=64, num_inference_steps=3, guidance_scale=5.0)
EXECUTION = Execution("demo", "UniPCMultistepScheduler", 3.0, "tp=4,ep=2")
DATA = bytes(range(250)) * 10
TIMEOUT_SECONDS = 10
LEASE_SECONDS = 60.0
MAX_OUTAGE_SECONDS = 10.0
ORPHAN_SWEEP_SECONDS = 3600.0


@dataclass
class DrivenEngine:
    """Notes what it is told; the test takes its jobs and reports on them."""

    num_notices: int = 0
    cancelled: list[str] = field(default_factory=list)

    def notify(self) -> None:
        self.num_notices += 1

    def cancel(self, claim_id: str) -> None:
        self.cancelled.append(claim_id)


class Bench:
    """A service that runs, its engine and its stores."""

    def __init__(
        self,
        service: JobService,
        engine: DrivenEngine,
        tools: JobTools,
        clock: PassingClock,
        directory: Path,
    ) -> None:
        self.service = service
        self.clock = clock
        self.engine = engine
        self.store = tools.store
        self.artifacts = tools.artifacts
        self.estimator = tools.estimator
        self.directory = directory

    async def submit(self, what: Submission, owner: str = "", call_id: str = "") -> Job:
        return await self.service.submit(what, owner, call_id)

    async def take(self) -> EngineRequest:
        """Take the next job as the engine does, once it is claimed, and start it."""
        request = await eventually(self.taken)
        request.on_event(RequestStarted())
        return request

    async def taken(self) -> EngineRequest | None:
        return self.service.executor.take()

    async def end(self, job_id: str) -> Body:
        """The last event of a job."""
        return (await self.events(job_id))[-1].body

    async def events(self, job_id: str) -> list[JobEvent]:
        """All events of a job that are still known, to its end."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return [event async for event in self.service.follow(None, job_id)]

    async def state(self, job_id: str, state: JobState) -> Job:
        """The job once it is in a state."""

        async def reached() -> Job | None:
            job = await self.service.get(None, job_id)
            return job if job.state is state else None

        return await eventually(reached)

    async def ended(self, job_id: str, state: JobState) -> Job:
        """The job once it has ended and nothing holds it any more."""
        job = await self.state(job_id, state)
        await until(lambda: self.service.executor.job(job_id) is None)
        return job

    async def run(self) -> str:
        """Take the next job and finish it with all its images."""
        request = await self.take()
        draw(request)
        await self.ended(request.job_id, JobState.SUCCEEDED)
        return request.job_id

    async def num_queued(self) -> int:
        await self.service.refresh_counts()
        return self.service.num_queued

    async def image(self, job_id: str, index: int = 0) -> bytes:
        """All bytes of a finished image of a job."""
        image = (await self.service.get(None, job_id)).images[index]
        return await self.service.image_reader(job_id).read(image, 0, image.size_bytes)

    def image_folders(self) -> set[str]:
        """Jobs that have images in the artifact store."""
        images = self.directory / "artifacts" / "images"
        return {path.name for path in images.iterdir()} if images.exists() else set()


async def until(condition: Callable[[], bool]) -> None:
    """Return once the condition holds; fail when it does not in time."""

    async def holds() -> bool:
        return condition()

    await eventually(holds)


_empty_stores: list[bytes] = []


async def _write_empty_store(path: Path) -> None:
    """Write a store of the newest schema, whose migrations run once for all tests of this process."""
    if not _empty_stores:
        store = SqlJobStore(f"sqlite+aiosqlite:///{path}")
        await store.open()
        await store.close()
        _empty_stores.append(await asyncio.to_thread(path.read_bytes))
    await asyncio.to_thread(path.write_bytes, _empty_stores[0])


@asynccontextmanager
async def bench_in(
    directory: Path,
    retention: RetentionLimits = RetentionLimits(3600, 100),  # noqa: B008
    artifacts: ArtifactStore | None = None,
    limits: RequestLimits = LIMITS,
) -> AsyncIterator[Bench]:
    """A service on a store in a folder; what was in the folder before is gone on with."""
    engine = DrivenEngine()

    def capacity() -> EngineCapacity:
        return EngineCapacity(limits.max_running_jobs, limits.max_pixels, num_ranks=1)

    path = directory / "jobs.sqlite"
    if not path.exists():
        await _write_empty_store(path)
    store = SqlJobStore(f"sqlite+aiosqlite:///{path}")
    clock = PassingClock()
    store.clock = StoreClock(clock)
    await store.open()
    tools = JobTools(
        store=store,
        artifacts=artifacts or ArtifactStore(directory / "artifacts"),
        estimator=JobEstimator(capacity),
        describe_execution=lambda: EXECUTION,
        chunk_bytes=limits.chunk_bytes,
        publish_to_replicas=lambda job_id, event: None,
        checkpoint_fingerprint=CHECKPOINT_FINGERPRINT,
    )
    service = JobService(
        tools,
        engine,
        LiveModel(MODEL_IDENTITY, TOKENIZERS, EXECUTION.scheduler, EXECUTION.shift, limits, DEFAULTS),
        limits,
        StorePolicy(LEASE_SECONDS, retention, ORPHAN_SWEEP_SECONDS, MAX_OUTAGE_SECONDS),
        lambda report: None,
        lambda is_ready: None,
        lambda: None,
        capacity,
    )
    await service.join()
    service.set_engine_state(EngineState.SERVING)
    work = asyncio.create_task(service.run())
    try:
        yield Bench(service, engine, tools, clock, directory)
    finally:
        await service.drain(0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await store.close()


def submission(
    request_id: str = "r",
    caller: str = "caller",
    priority: Priority = Priority.NORMAL,
    is_detached: bool = False,
    deadline_seconds: float | None = None,
    seed: int = 7,
    num_images: int = 1,
) -> Submission:
    return Submission(
        GenerationParameters(
            prompt="a red circle",
            width=64,
            height=64,
            num_inference_steps=3,
            guidance_scale=5.0,
            num_images=num_images,
            seed=seed,
        ),
        request_id,
        caller,
        priority,
        is_detached=is_detached,
        deadline_seconds=deadline_seconds,
        model=MODEL_IDENTITY,
    )


def draw(request: EngineRequest) -> None:
    """Report a whole job, from its encoded prompts to its last image."""
    request.on_event(PromptsEncoded(0.25))
    for step in range(1, request.parameters.num_inference_steps + 1):
        request.on_event(StepFinished(step, 0.1))
    for index in range(request.parameters.num_images):
        request.on_event(ImageFinished(index, DATA, 0.5))
    request.on_event(RequestFinished())


def kinds(events: list[JobEvent]) -> list[str]:
    return [type(event.body).__name__ for event in events]
