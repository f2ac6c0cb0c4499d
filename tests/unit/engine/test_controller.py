"""The controller's rounds, with ranks that only count: decoding beside steps, and what follows a loss."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import cast

import pytest

from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import (
    Decode,
    DecodedImage,
    JobFault,
    PlanDone,
    StepPlan,
    StepSnapshot,
)
from hidream_grpc.engine.requests import (
    EngineEvent,
    EngineRequest,
    EngineState,
    ImageFinished,
    PromptReport,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
    RequestStarted,
    StepFinished,
)
from hidream_grpc.engine.step_limit import MIN_WAIT_STEPS, StepLimit
from hidream_grpc.errors import (
    JobError,
    JobInternalError,
    LossCause,
    NonFiniteError,
    OutOfDeviceMemoryError,
    RankDiedError,
    SnapshotError,
)
from hidream_grpc.model.parameters import GenerationParameters

ROUNDS_PER_IMAGE = 5
STEP_SECONDS = {64: 0.5, 128: 4.0}


@dataclass
class CountingRanks:
    """Ranks that take `ROUNDS_PER_IMAGE` plans for an image; a step's time depends on the width alone.

    Attributes:
        world_size, checkpoint_fingerprint: as of a `RankGroup`.
        on_plan: called with each plan before it is done.
        faults_of: what fails in a plan.
        has_survivor: whether a rank still knows the states after a loss.
        plans: all of them.
        images: that each rank is at, with the rounds that are left.
    """

    world_size: int = 1
    checkpoint_fingerprint: str = "86637e71f35d8ddd"
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
    """A controller with its backlog, and everything that it tells."""

    def __init__(self, ranks: CountingRanks, max_running_requests: int = 10) -> None:
        self.events: list[tuple[str, EngineEvent]] = []
        self.prompts: list[PromptReport] = []
        self._waiting: deque[EngineRequest] = deque()
        self._ended = asyncio.Event()
        self.step_limit = StepLimit(2**40)
        self.controller = Controller(
            cast(RankGroup, ranks),
            self.step_limit,
            max_running_requests,
            step_observers=(),
            prompt_observers=(self.prompts.append,),
        )

    def take(self) -> EngineRequest | None:
        return self._waiting.popleft() if self._waiting else None

    def set_engine_state(self, state: EngineState) -> None:
        pass

    def submit(
        self, claim_id: str, num_inference_steps: int, job_id: str | None = None, **changes: object
    ) -> None:
        """Queue a request; unless told otherwise it is of the job "job of <claim id>"."""
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
        """The steps that a job was told of, in order."""
        return [e.step for j, e in self.events if j == claim_id and isinstance(e, StepFinished)]

    def _note(self, claim_id: str, event: EngineEvent) -> None:
        self.events.append((claim_id, event))
        if isinstance(event, (RequestFinished, RequestFailed)):
            self._ended.set()


async def test_others_take_a_step_in_every_round_of_an_image() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    service.submit("decodes", num_inference_steps=1, width=128, height=128)
    service.submit("steps", num_inference_steps=20)
    await service.run_until_ended("decodes", "steps")
    started = next(number for number, plan in enumerate(ranks.plans) if plan.decodes)
    assert all(plan.step_claims == ("steps",) for plan in ranks.plans[started : started + ROUNDS_PER_IMAGE])
    kinds = [(claim_id, type(event)) for claim_id, event in service.events]
    between = kinds[kinds.index(("decodes", StepFinished)) : kinds.index(("decodes", ImageFinished))]
    assert between.count(("steps", StepFinished)) >= ROUNDS_PER_IMAGE


async def test_an_image_is_finished_where_nobody_takes_a_step_any_more() -> None:
    ranks = CountingRanks(world_size=2)
    service = Service(ranks)
    service.submit("alone", num_inference_steps=1, num_images=3)
    await service.run_until_ended("alone")
    images = [event.image_index for _, event in service.events if isinstance(event, ImageFinished)]
    assert images == [0, 1, 2]
    assert sum(bool(plan.decodes) for plan in ranks.plans) == 2


async def test_a_round_may_decode_for_one_step_time_of_those_that_step_in_it() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    service.submit("large", num_inference_steps=2, width=128, height=128)
    service.submit("small", num_inference_steps=9)
    await service.run_until_ended("large", "small")
    small, large = STEP_SECONDS[64], STEP_SECONDS[128]
    budgets = [(plan.step_claims, plan.decode_budget_seconds) for plan in ranks.plans]
    assert budgets[:4] == [
        (("large",), None),
        # Its own time is not known yet.
        (("small",), large),
        (("large",), large),
        (("small",), small),
    ]
    assert set(budgets[4:]) == {(("small",), small), ((), small)}


async def test_no_more_requests_run_than_allowed_and_an_ended_one_makes_room() -> None:
    ranks = CountingRanks()
    service = Service(ranks, max_running_requests=2)
    for claim_id, num_inference_steps in (("a", 1), ("b", 9), ("c", 1)):
        service.submit(claim_id, num_inference_steps)
    await service.run_until_ended("c")
    admitted = [[a.claim_id for a in plan.admissions] for plan in ranks.plans if plan.admissions]
    assert admitted == [["a", "b"], ["c"]]
    kinds = [(claim_id, type(event)) for claim_id, event in service.events]
    assert kinds.index(("a", RequestFinished)) < kinds.index(("c", RequestStarted))


async def test_a_cancelled_request_frees_the_rank_that_decodes_its_image() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    def cancel_in_the_second_round(_plan: StepPlan) -> None:
        if ranks.images.get(0, (None, 0))[1] == ROUNDS_PER_IMAGE - 1:
            service.controller.cancel("leaves")

    ranks.on_plan = cancel_in_the_second_round
    service.submit("leaves", num_inference_steps=1)
    service.submit("waits", num_inference_steps=1)
    await service.run_until_ended("waits")
    assert service.claims_with(ImageFinished) == ["waits"]
    released = next(plan for plan in ranks.plans if plan.releases)
    assert released.releases == ("leaves",)
    assert released.decodes == (Decode(claim_id="waits", image_index=0, rank=0),)


async def test_a_stale_claim_that_is_cancelled_leaves_a_newer_claim_of_its_job_alone() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    def cancel_the_older_once_both_step(plan: StepPlan) -> None:
        if set(plan.step_claims) == {"job/1", "job/2"}:
            service.controller.cancel("job/1")

    ranks.on_plan = cancel_the_older_once_both_step
    service.submit("job/1", num_inference_steps=3, job_id="job")
    service.submit("job/2", num_inference_steps=3, job_id="job")
    await service.run_until_ended("job/2")
    assert service.steps_of("job/2") == [1, 2, 3]
    assert service.claims_with(RequestFinished) == ["job/2"]
    assert ("job/1",) in [plan.releases for plan in ranks.plans]


async def test_an_image_that_was_lost_with_its_rank_is_decoded_again() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    losses = [RankDiedError((0,), "killed by SIGKILL")]

    def die_in_the_second_round_of_the_second_image(_plan: StepPlan) -> None:
        at_second = ranks.images.get(0) and ranks.images[0][0].image_index == 1
        if losses and at_second and ranks.images[0][1] == ROUNDS_PER_IMAGE - 1:
            raise losses.pop()

    ranks.on_plan = die_in_the_second_round_of_the_second_image
    service.submit("survives", num_inference_steps=2, num_images=2)
    await service.run_until_ended("survives")
    assert service.claims_with(RequestRestarted) == ["survives"]
    images = [event.image_index for _, event in service.events if isinstance(event, ImageFinished)]
    assert images == [0, 1]
    assert service.steps_of("survives") == [1, 2]


async def test_prompts_are_counted_once_for_a_plan_and_not_for_every_rank() -> None:
    service = Service(CountingRanks(world_size=3))
    for claim_id in ("first", "second"):
        service.submit(claim_id, num_inference_steps=2)
    await service.run_until_ended("first", "second")
    assert service.prompts == [PromptReport(num_cache_hits=2, num_cache_misses=4)]


def lost_in(
    ranks: CountingRanks, breaks: Callable[[StepPlan], bool], cause: LossCause, times: int = 1
) -> None:
    """Lose the group in the first plans that break it."""
    left = [RankDiedError((0,), "gone", cause)] * times

    def on_plan(plan: StepPlan) -> None:
        if left and breaks(plan):
            raise left.pop()

    ranks.on_plan = on_plan


def has_step_of(*claim_ids: str) -> Callable[[StepPlan], bool]:
    return lambda plan: set(claim_ids) <= set(plan.step_claims)


async def test_jobs_go_on_after_a_loss_from_what_a_survivor_knows() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    service.submit("a", num_inference_steps=3)
    lost_in(ranks, lambda plan: len(ranks.plans) == 3, LossCause.OUTSIDE)
    await service.run_until_ended("a")
    (again,) = (a for plan in ranks.plans[1:] for a in plan.admissions)
    assert again.snapshot == b"a after 2"
    # Ranks of a new generation hold nothing that they could release.
    assert ranks.plans[3].releases == ()
    assert service.steps_of("a") == [1, 2, 3]
    assert [e for _, e in service.events if isinstance(e, RequestRestarted)] == [
        RequestRestarted(2, "rank 0: gone", 2)
    ]


async def test_without_a_survivor_jobs_go_on_from_what_was_handed_up_or_their_seed() -> None:
    ranks = CountingRanks(has_survivor=False)
    service = Service(ranks)
    service.submit("a", num_inference_steps=3)
    lost_in(ranks, lambda plan: len(ranks.plans) == 3, LossCause.OUTSIDE)
    await service.run_until_ended("a")
    (again,) = (a for plan in ranks.plans[1:] for a in plan.admissions)
    assert again.snapshot == b"handed up"
    # The snapshot of these ranks is always one of step 0.
    assert service.steps_of("a") == [1, 2, 1, 2, 3]
    assert service.controller.num_lost_steps == 2


async def test_while_suspects_run_alone_nobody_new_is_started() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=4)
    lost_in(ranks, has_step_of("a", "b"), LossCause.FAULT)
    ranks_on_plan = ranks.on_plan

    def submit_when_lost(plan: StepPlan) -> None:
        if len(ranks.plans) == 1:
            service.submit("newcomer", num_inference_steps=1)
        ranks_on_plan(plan)

    ranks.on_plan = submit_when_lost
    await service.run_until_ended("a", "b", "newcomer")
    stepped = [set(plan.step_claims) for plan in ranks.plans]
    assert stepped[:4] == [{"a", "b"}, {"a"}, {"b"}, {"a", "b", "newcomer"}]
    assert service.claims_with(RequestFailed) == []


async def test_a_job_that_is_lost_alone_again_fails_and_the_suspicion_ends() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("innocent", "guilty"):
        service.submit(claim_id, num_inference_steps=3)
    lost_in(ranks, has_step_of("guilty"), LossCause.FAULT, times=9)
    await service.run_until_ended("innocent", "guilty")
    assert isinstance(service.error_of("guilty"), JobInternalError)
    assert service.steps_of("innocent") == [1, 2, 3]


async def test_a_lowered_limit_rises_and_the_log_says_so_once_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=3 * MIN_WAIT_STEPS)
    lost_in(ranks, has_step_of("a", "b"), LossCause.OUT_OF_MEMORY)
    await service.run_until_ended("a", "b")
    rises = [message for message in caplog.messages if message.endswith("pixels again")]
    assert rises[:2] == [f"a step may hold {pixels} pixels again" for pixels in (5120, 6400)]
    # The two fit again after the fourth rise.
    assert len(rises) == 4
    assert service.step_limit.pixels == 10_000


async def test_ranks_that_are_new_for_another_reason_may_hold_what_is_configured_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=3)
    losses = [
        RankDiedError((0,), "no memory for a step", LossCause.OUT_OF_MEMORY),
        RankDiedError((0,), "killed by SIGKILL", LossCause.OUTSIDE),
    ]

    def lose(plan: StepPlan) -> None:
        if losses and plan.step_claims:
            raise losses.pop(0)

    ranks.on_plan = lose
    await service.run_until_ended("a", "b")
    assert service.step_limit.pixels == 2**40
    assert caplog.messages.count(f"a step may hold {2**40} pixels again") == 1


async def test_a_lack_of_memory_lowers_what_a_step_may_hold() -> None:
    ranks = CountingRanks()
    service = Service(ranks)
    for claim_id in ("a", "b"):
        service.submit(claim_id, num_inference_steps=3)
    lost_in(ranks, has_step_of("a", "b"), LossCause.OUT_OF_MEMORY)
    await service.run_until_ended("a", "b")
    assert service.step_limit.pixels == 64 * 64
    assert [len(plan.step_claims) for plan in ranks.plans if plan.step_claims] == [2, 1, 1, 1, 1, 1, 1]
    assert service.claims_with(RequestFailed) == []


async def test_a_job_that_has_no_room_beside_others_is_tried_alone() -> None:
    ranks = CountingRanks()
    service = Service(ranks)

    def no_room_in_company(plan: StepPlan) -> tuple[JobFault, ...]:
        is_large_started = any(admission.claim_id == "large" for admission in plan.admissions)
        if is_large_started and len(plan.step_claims) > 1:
            return (JobFault(claim_id="large", kind=OutOfDeviceMemoryError.__name__, error_id=""),)
        return ()

    ranks.faults_of = no_room_in_company
    for claim_id in ("small", "large"):
        service.submit(claim_id, num_inference_steps=3)
    await service.run_until_ended("small", "large")
    assert service.claims_with(RequestFailed) == []
    assert [plan.step_claims for plan in ranks.plans][1] == ("large",)
    for claim_id in ("small", "large"):
        assert service.steps_of(claim_id) == [1, 2, 3]


async def test_a_job_whose_snapshot_the_ranks_refuse_starts_from_its_seed() -> None:
    ranks = CountingRanks()
    ranks.faults_of = lambda plan: tuple(
        JobFault(claim_id=a.claim_id, kind=SnapshotError.__name__, error_id="", reason="of another dtype")
        for a in plan.admissions
        if a.snapshot
    )
    service = Service(ranks)
    for claim_id in ("resumed", "beside"):
        service.submit(claim_id, num_inference_steps=3)
    lost_in(ranks, lambda plan: len(ranks.plans) == 3, LossCause.OUTSIDE)
    await service.run_until_ended("resumed", "beside")
    assert service.claims_with(RequestFailed) == []
    restarts = [e.resumed_from_step for _, e in service.events if isinstance(e, RequestRestarted)]
    assert restarts == [2, 2, 0, 0]
    assert service.steps_of("resumed") == service.steps_of("beside") == [1, 2, 1, 2, 3]
    assert service.controller.num_lost_steps == 4


async def test_numbers_that_every_rank_finds_not_finite_fail_their_job_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = CountingRanks(world_size=2)
    ranks.faults_of = lambda plan: tuple(
        JobFault(claim_id=claim_id, kind=NonFiniteError.__name__, error_id="", reason="NaN (step 2)")
        for claim_id in plan.step_claims
        if claim_id == "bad" and len(ranks.plans) == 2
    )
    service = Service(ranks)
    for claim_id in ("bad", "good"):
        service.submit(claim_id, num_inference_steps=3)
    await service.run_until_ended("bad", "good")
    assert service.steps_of("bad") == [1]
    assert service.steps_of("good") == [1, 2, 3]
    error = service.error_of("bad")
    assert isinstance(error, JobInternalError)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == "job failed: NaN (step 2)"
    assert (record.__dict__["job_id"], record.__dict__["error_id"]) == ("job of bad", error.error_id)
    assert error.error_id


async def test_a_job_that_has_no_room_alone_fails_for_want_of_memory() -> None:
    ranks = CountingRanks()
    ranks.faults_of = lambda plan: tuple(
        JobFault(claim_id=a.claim_id, kind=OutOfDeviceMemoryError.__name__, error_id="")
        for a in plan.admissions
        if a.claim_id == "large"
    )
    service = Service(ranks)
    for claim_id in ("small", "large"):
        service.submit(claim_id, num_inference_steps=3)
    await service.run_until_ended("small", "large")
    assert service.steps_of("small") == [1, 2, 3]
    error = service.error_of("large")
    assert isinstance(error, OutOfDeviceMemoryError)
    assert error.job_id == "job of large"
