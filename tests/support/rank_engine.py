"""The controller on a real rank group, with everything that it reports of each job."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.requests import (
    EngineEvent,
    EngineRequest,
    EngineState,
    ImageFinished,
    RequestFailed,
    RequestFinished,
    StepFinished,
    StepReport,
)
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.engine.step_limit_file import StepLimitFile
from hidream_grpc.model.parameters import GenerationParameters, SampleSize

END_SECONDS = 90.0

Event = TypeVar("Event")


class RankEngine:
    """A controller that runs what is submitted.

    Attributes:
        controller: as the server has it.
        step_limit: the controller's.
        reports: of all steps.
    """

    def __init__(self, group: RankGroup) -> None:
        self.reports: list[StepReport] = []
        self.step_limit = StepLimit(2**40)
        self.controller = Controller(
            group,
            self.step_limit,
            StepLimitFile(None),
            step_observers=(self.reports.append,),
            prompt_observers=(),
        )
        self.is_serving = asyncio.Event()
        self.has_failed = asyncio.Event()
        self._events: defaultdict[str, list[EngineEvent]] = defaultdict(list)
        self._waiting: deque[EngineRequest] = deque()
        self._news = asyncio.Event()

    waiting_sizes: Collection[SampleSize] = ()

    def take(self) -> EngineRequest | None:
        return self._waiting.popleft() if self._waiting else None

    def submit(
        self,
        job_id: str,
        parameters: GenerationParameters,
        on_event: Callable[[EngineEvent], None] = lambda _event: None,
        snapshot: bytes | None = None,
    ) -> None:
        """Queue a request; on_event is called with each event of it when it comes."""

        def note(event: EngineEvent) -> None:
            self._events[job_id].append(event)
            on_event(event)
            self._news.set()

        self._waiting.append(
            EngineRequest(job_id, job_id, f"request of {job_id}", parameters, note, snapshot=snapshot)
        )
        self.controller.notify()

    async def draw(self, job_id: str, parameters: GenerationParameters) -> list[bytes]:
        """The images of a request, in order."""
        self.submit(job_id, parameters)
        await self.ended(job_id)
        return self.images(job_id)

    async def ended(self, *job_ids: str) -> None:
        """Wait until these requests have ended, however they did."""
        async with asyncio.timeout(END_SECONDS):
            while not all(
                self.events(job_id, RequestFinished) or self.events(job_id, RequestFailed)
                for job_id in job_ids
            ):
                self._news.clear()
                await self._news.wait()

    def events(self, job_id: str, kind: type[Event]) -> list[Event]:
        """The events of a kind that a request had, in order."""
        return [event for event in self._events[job_id] if isinstance(event, kind)]

    def steps(self, job_id: str) -> list[int]:
        """The steps that were reported of a request, in order."""
        return [event.step for event in self.events(job_id, StepFinished)]

    def images(self, job_id: str) -> list[bytes]:
        """The images of a request that has finished, in order."""
        assert not self.events(job_id, RequestFailed)
        return [e.data for e in sorted(self.events(job_id, ImageFinished), key=lambda e: e.image_index)]

    def set_engine_state(self, state: EngineState) -> None:
        if state is EngineState.SERVING:
            self.is_serving.set()
        else:
            self.is_serving.clear()
        if state is EngineState.FAILED:
            self.has_failed.set()


@asynccontextmanager
async def running_engine(group: RankGroup) -> AsyncIterator[RankEngine]:
    """An engine that owns this group, until the block ends."""
    engine = RankEngine(group)
    running = asyncio.create_task(engine.controller.run(engine))
    serving = asyncio.create_task(engine.is_serving.wait())
    try:
        await asyncio.wait((running, serving), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        yield engine
    finally:
        serving.cancel()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
