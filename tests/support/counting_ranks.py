"""The controller with ranks that only count, and everything that it reports."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from hidream_grpc.devices.detect import select_devices
from hidream_grpc.devices.device_types import CPU
from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.placement import Placement
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import (
    Decode,
    DecodedImage,
    JobFault,
    Loaded,
    PlanDone,
    StepPlan,
    StepSnapshot,
)
from hidream_grpc.engine.requests import (
    EngineEvent,
    EngineRequest,
    EngineState,
    PromptReport,
    RequestFailed,
    RequestFinished,
    StepFinished,
)
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.engine.step_limit_file import StepLimitFile
from hidream_grpc.errors import (
    JobError,
    RankDiedError,
)
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import GenerationParameters, SampleSize
from hidream_grpc.model.weight_format import WeightFormats

ROUNDS_PER_IMAGE = 5
PLACEMENT = Placement.of(Layout(), select_devices(CPU, (0,)), (0,))
STEP_SECONDS = {64: 0.5, 128: 4.0}


@dataclass
class CountingRanks:
    """Ranks that take `ROUNDS_PER_IMAGE` plans for an image; a step's time depends on the width alone.

    Attributes:
        world_size, checkpoint_fingerprint, loaded, placement, weights: as of a `RankGroup`.
        on_plan: called with each plan before it is done.
        faults_of: what fails in a plan.
        has_survivor: whether a rank still knows the states after a loss.
        plans: all of them.
        images: that each rank is at, with the rounds that are left.
    """

    world_size: int = 1
    checkpoint_fingerprint: str = "86637e71f35d8ddd"
    loaded: tuple[Loaded, ...] = ()
    placement: Placement = PLACEMENT
    weights: WeightFormats = field(default_factory=WeightFormats)
    on_plan: Callable[[StepPlan], None] = lambda _plan: None
    faults_of: Callable[[StepPlan], tuple[JobFault, ...]] = lambda _plan: ()
    has_survivor: bool = True
    generation: int = 1
    plans: list[StepPlan] = field(default_factory=list)
    images: dict[int, tuple[Decode, int]] = field(default_factory=dict)
    jobs: dict[str, GenerationParameters] = field(default_factory=dict)

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def wait_for_loss(self) -> RankDiedError:
        await asyncio.Event().wait()
        raise AssertionError("no rank dies while nothing is to do")

    async def recover(self, _keep_snapshots: Callable[[], Awaitable[None]]) -> tuple[int, ...]:
        self.jobs.clear()
        self.images.clear()
        return (0,)

    async def snapshot_of(self, claim_id: str, step: int) -> bytes | None:
        return f"{claim_id} after {step}".encode() if self.has_survivor else None

    async def execute(self, plan: StepPlan) -> tuple[PlanDone, ...]:
        self.plans.append(plan)
        self.on_plan(plan)
        # As a group that computes: other tasks of the server run meanwhile.
        await asyncio.sleep(0)
        for claim_id in plan.releases:
            self.jobs.pop(claim_id, None)
            self.images = {r: image for r, image in self.images.items() if image[0].claim_id != claim_id}
        self.jobs |= {admission.claim_id: admission.parameters for admission in plan.admissions}
        for decode in plan.decodes:
            assert decode.rank not in self.images, "a rank decodes one image at a time"
            assert decode.claim_id in self.jobs
            self.images[decode.rank] = (decode, ROUNDS_PER_IMAGE)
        faults = self.faults_of(plan)
        step_seconds = max(
            (STEP_SECONDS[self.jobs[claim_id].width] for claim_id in plan.step_claims), default=0.0
        )
        return tuple(
            PlanDone(
                plan_id=plan.plan_id,
                encode_seconds=0.0,
                step_seconds=step_seconds,
                num_prompt_cache_hits=len(plan.admissions),
                num_prompt_cache_misses=2 * len(plan.admissions),
                snapshot=self._snapshot(plan) if rank == 0 else None,
                faults=faults,
                images=self._decode(rank),
            )
            for rank in range(self.world_size)
        )

    def _snapshot(self, plan: StepPlan) -> StepSnapshot | None:
        if plan.snapshot_claim is None:
            return None
        return StepSnapshot(claim_id=plan.snapshot_claim, step=0, data=b"handed up", snapshot_seconds=0.0)

    def _decode(self, rank: int) -> tuple[DecodedImage, ...]:
        if rank not in self.images:
            return ()
        decode, rounds = self.images.pop(rank)
        if rounds > 1:
            self.images[rank] = (decode, rounds - 1)
            return ()
        return (
            DecodedImage(
                claim_id=decode.claim_id, image_index=decode.image_index, data=b"", decode_seconds=1.0
            ),
        )


class Service:
    """A controller with its backlog, and everything that it reports."""

    def __init__(
        self,
        ranks: CountingRanks,
        max_step_pixels: int = 2**40,
        learnt_path: Path | None = None,
    ) -> None:
        self.events: list[tuple[str, EngineEvent]] = []
        self.prompts: list[PromptReport] = []
        self._waiting: deque[EngineRequest] = deque()
        self._ended = asyncio.Event()
        self.step_limit = StepLimit(max_step_pixels)
        self.controller = Controller(
            cast(RankGroup, ranks),
            self.step_limit,
            StepLimitFile(learnt_path),
            step_observers=(),
            prompt_observers=(self.prompts.append,),
        )

    waiting_sizes: Collection[SampleSize] = ()

    def take(self) -> EngineRequest | None:
        return self._waiting.popleft() if self._waiting else None

    def set_engine_state(self, state: EngineState) -> None:
        pass

    def submit(
        self, claim_id: str, num_inference_steps: int, job_id: str | None = None, **changes: object
    ) -> None:
        """Queue a request; without a job_id it is of the job "job of <claim id>"."""
        values: dict[str, object] = {
            "prompt": "",
            "width": 64,
            "height": 64,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": 1.0,
            "seed": 0,
        }
        parameters = GenerationParameters(**(values | changes))  # type: ignore[arg-type]
        self._waiting.append(
            EngineRequest(
                claim_id,
                job_id or f"job of {claim_id}",
                f"request of {claim_id}",
                parameters,
                lambda event: self._note(claim_id, event),
            )
        )
        self.controller.notify()

    async def run_until_ended(self, *claim_ids: str) -> None:
        """Run until these requests have finished or failed."""
        running = asyncio.create_task(self.controller.run(self))
        try:
            async with asyncio.timeout(10):
                while not set(claim_ids) <= {
                    *self.claims_with(RequestFinished),
                    *self.claims_with(RequestFailed),
                }:
                    self._ended.clear()
                    ended = asyncio.create_task(self._ended.wait())
                    await asyncio.wait((running, ended), return_when=asyncio.FIRST_COMPLETED)
                    if running.done():
                        running.result()
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    def claims_with(self, kind: type[EngineEvent]) -> list[str]:
        """The claim of each event of a kind, in order."""
        return [claim_id for claim_id, event in self.events if isinstance(event, kind)]

    def error_of(self, claim_id: str) -> JobError | None:
        """Why a job failed, if it did."""
        errors = [e.error for j, e in self.events if j == claim_id and isinstance(e, RequestFailed)]
        return errors[0] if errors else None

    def steps_of(self, claim_id: str) -> list[int]:
        """The steps that were reported of a request, in order."""
        return [e.step for j, e in self.events if j == claim_id and isinstance(e, StepFinished)]

    def _note(self, claim_id: str, event: EngineEvent) -> None:
        self.events.append((claim_id, event))
        if isinstance(event, (RequestFinished, RequestFailed)):
            self._ended.set()
