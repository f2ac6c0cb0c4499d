"""The job service on a bench: with a small engine that the test drives, and a real artifact store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from hidream_grpc.engine.requests import (
    EngineRequest,
    EngineState,
    ImageFinished,
    PromptsEncoded,
    RequestFinished,
    RequestStarted,
    StepFinished,
)
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates import EngineCapacity
from hidream_grpc.jobs.events import (
    Body,
    JobEvent,
)
from hidream_grpc.jobs.job import Execution, Priority, Submission
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.outlook import Outlook
from hidream_grpc.jobs.service import JobService, RetentionPolicy
from hidream_grpc.model.parameters import GenerationParameters

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
EXECUTION = Execution("demo", "UniPCMultistepScheduler", 3.0, "tp=4,ep=2")
DATA = bytes(range(250)) * 10
TIMEOUT_SECONDS = 10


@dataclass
class DrivenEngine:
    """Notes what it is told; the test takes its jobs and reports on them."""

    num_notices: int = 0
    cancelled: list[str] = field(default_factory=list)

    def notify(self) -> None:
        self.num_notices += 1

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)


@dataclass
class Bench:
    """A service, its engine and its store."""

    service: JobService
    engine: DrivenEngine
    directory: Path
    outlook: Outlook

    def take(self) -> EngineRequest:
        """Take the next job as the engine does, and start it."""
        request = self.service.take()
        assert request is not None
        request.on_event(RequestStarted())
        return request

    async def end(self, job_id: str) -> Body:
        """The last event of a job."""
        return (await self.events(job_id))[-1].body

    async def events(self, job_id: str) -> list[JobEvent]:
        """All events of a job that are still known, to its end."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return [event async for event in self.service.follow(job_id)]

    async def run(self) -> str:
        """Take the next job and finish it with all its images."""
        request = self.take()
        draw(request)
        await self.end(request.job_id)
        return request.job_id


def bench_in(
    directory: Path,
    retention: RetentionPolicy = RetentionPolicy(3600, 100),  # noqa: B008
    store: ArtifactStore | None = None,
    limits: RequestLimits = LIMITS,
) -> Bench:
    engine = DrivenEngine()
    artifacts = store or ArtifactStore(directory)
    outlook = Outlook(lambda: EngineCapacity(limits.max_running_jobs, limits.max_pixels, num_ranks=1))
    service = JobService(limits, retention, artifacts, engine, lambda: EXECUTION, outlook)
    service.set_engine_state(EngineState.SERVING)
    return Bench(service, engine, directory, outlook)


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
