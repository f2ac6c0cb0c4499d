"""The engine's loop: plan a round, let the ranks do it, tell the requests, recover when ranks die."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from hidream_grpc.engine.messages import Admission, JobFault, PlanDone, StepPlan
from hidream_grpc.engine.requests import (
    Backlog,
    EngineRequest,
    EngineState,
    ImageFinished,
    PreviewMade,
    PromptsEncoded,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
    RequestStarted,
    StepFinished,
)
from hidream_grpc.engine.scheduler import StepScheduler
from hidream_grpc.engine.supervisor import RankGroup
from hidream_grpc.errors import JobError, JobInternalError, OutOfDeviceMemoryError, RankDiedError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
RECOVERY_PAUSE_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class _Active:
    request: EngineRequest
    attempt: int = 1
    # Of its latest step.
    step_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One denoising step of a batch, for whoever counts."""

    step_seconds: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class PromptReport:
    """How the prompts of requests that started came to be encoded, for whoever counts.

    Attributes:
        num_cache_hits: prompts that were encoded already; the empty one, which always is, not counted.
        num_cache_misses: prompts for which the text encoders ran.
    """

    num_cache_hits: int
    num_cache_misses: int


class Controller:
    """Runs requests on a rank group, one denoising step of all of them at a time.

    All methods belong to the event loop's thread. `run` owns the group: it starts it, recovers it
    and stops it.
    """

    def __init__(
        self,
        group: RankGroup,
        scheduler: StepScheduler,
        on_state: Callable[[EngineState], None],
        on_step: Callable[[StepReport], None],
        on_prompts: Callable[[PromptReport], None],
    ) -> None:
        self._group = group
        self._scheduler = scheduler
        self._on_state = on_state
        self._on_step = on_step
        self._on_prompts = on_prompts
        self._active: dict[str, _Active] = {}
        # Jobs that the ranks must start from their seed in the next plan.
        self._admissions: list[str] = []
        # Jobs that a rank may hold a state of: every one that was ever in a plan and not yet released.
        self._held: set[str] = set()
        self._wake = asyncio.Event()
        self._next_plan_id = 1
        # Of the latest step of any job.
        self._step_seconds: float | None = None

    def notify(self) -> None:
        """Say that the backlog has a request."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Drop a running request: it takes no further step and reports nothing more."""
        if self._active.pop(job_id, None) is not None:
            self._forget(job_id)

    async def run(self, backlog: Backlog) -> None:
        """Start the group and work off the backlog until cancelled; then nothing of the group is left.

        Raises:
            RankDiedError: the group could not be started at all.
            StartupError: the ranks said why they cannot start.
        """
        try:
            self._on_state(EngineState.STARTING)
            await self._group.start()
            self._on_state(EngineState.SERVING)
            while True:
                await self._round(backlog)
        finally:
            self._on_state(EngineState.STOPPED)
            await self._group.stop()

    async def _round(self, backlog: Backlog) -> None:
        plan = self._plan(backlog)
        try:
            if plan is None:
                await self._wait_for_work()
                return
            answers = await self._group.execute(plan)
        except RankDiedError as loss:
            lost = loss
        else:
            self._apply(plan, answers)
            return
        await self._recover(lost)

    def _plan(self, backlog: Backlog) -> StepPlan | None:
        while self._scheduler.has_capacity and (request := backlog.take()) is not None:
            self._start(request)
        admissions = tuple(self._admission(job_id) for job_id in self._admissions if job_id in self._active)
        started = {admission.job_id for admission in admissions}
        releases = tuple(job_id for job_id in self._held if job_id not in self._active or job_id in started)
        step_jobs = self._scheduler.next_step()
        decodes = self._scheduler.next_decodes(self._group.world_size)
        if not (step_jobs or decodes or releases or self._scheduler.is_decoding):
            return None
        plan = StepPlan(
            plan_id=self._next_plan_id,
            releases=releases,
            admissions=admissions,
            step_jobs=step_jobs,
            decodes=decodes,
            decode_budget_seconds=self._decode_budget_seconds(step_jobs),
        )
        self._next_plan_id += 1
        self._scheduler.planned(decodes)
        self._held |= started
        self._admissions.clear()
        return plan

    def _decode_budget_seconds(self, step_jobs: tuple[str, ...]) -> float | None:
        """One step time of those that step, so that a decode at most doubles their wait, but for a slice.

        A round without a step has a budget too: a request may arrive meanwhile.
        """
        known = (self._active[job_id].step_seconds for job_id in step_jobs)
        return min((seconds for seconds in known if seconds is not None), default=self._step_seconds)

    def _start(self, request: EngineRequest) -> None:
        self._active[request.job_id] = _Active(request)
        self._scheduler.admit(request.job_id, request.parameters)
        self._admissions.append(request.job_id)
        request.on_event(RequestStarted())

    def _admission(self, job_id: str) -> Admission:
        request = self._active[job_id].request
        return Admission(job_id=job_id, request_id=request.request_id, parameters=request.parameters)

    async def _wait_for_work(self) -> None:
        """Sleep until the backlog has a request; raises RankDiedError when a rank dies meanwhile."""
        self._wake.clear()
        work = asyncio.ensure_future(self._wake.wait())
        loss = asyncio.ensure_future(self._group.wait_for_loss())
        try:
            await asyncio.wait((work, loss), return_when=asyncio.FIRST_COMPLETED)
            if loss.done():
                raise loss.result()
        finally:
            work.cancel()
            loss.cancel()

    def _apply(self, plan: StepPlan, answers: tuple[PlanDone, ...]) -> None:
        """Tell each request what the round brought it."""
        self._held -= set(plan.releases) - {admission.job_id for admission in plan.admissions}
        if plan.admissions:
            # Every rank counts the same prompts.
            counts = answers[0]
            self._on_prompts(PromptReport(counts.num_prompt_cache_hits, counts.num_prompt_cache_misses))
        encode_seconds = max(answer.encode_seconds for answer in answers)
        for admission in plan.admissions:
            if active := self._active.get(admission.job_id):
                active.request.on_event(PromptsEncoded(encode_seconds))
        for fault in {f.job_id: f for answer in answers for f in answer.faults}.values():
            self._fail(fault.job_id, _error_of(fault))
        if plan.step_jobs:
            self._apply_step(plan, answers)
        for image in (image for answer in answers for image in answer.images):
            self._scheduler.decoded(image.job_id, image.image_index)
            if active := self._active.get(image.job_id):
                active.request.on_event(ImageFinished(image.image_index, image.data, image.decode_seconds))
                if self._scheduler.is_finished(image.job_id):
                    self._finish(image.job_id)

    def _apply_step(self, plan: StepPlan, answers: tuple[PlanDone, ...]) -> None:
        step_seconds = max(answer.step_seconds for answer in answers)
        previews = {preview.job_id: preview.data for answer in answers for preview in answer.previews}
        self._step_seconds = step_seconds
        self._scheduler.stepped(plan.step_jobs)
        num_samples = 0
        for job_id in plan.step_jobs:
            if active := self._active.get(job_id):
                step = self._scheduler.step_of(job_id)
                num_samples += active.request.parameters.num_samples
                active.step_seconds = step_seconds
                active.request.on_event(StepFinished(step, step_seconds))
                if job_id in previews:
                    active.request.on_event(PreviewMade(step, previews[job_id]))
        self._on_step(StepReport(step_seconds, num_samples))

    def _finish(self, job_id: str) -> None:
        active = self._active.pop(job_id)
        self._forget(job_id)
        active.request.on_event(RequestFinished())

    def _fail(self, job_id: str, error: JobError) -> None:
        if active := self._active.pop(job_id, None):
            self._forget(job_id)
            active.request.on_event(RequestFailed(error))

    def _forget(self, job_id: str) -> None:
        self._scheduler.release(job_id)
        # Even an idle group must be told, or the ranks keep the latents.
        self._wake.set()

    async def _recover(self, loss: RankDiedError) -> None:
        """Bring the group back, however long it takes, and start the running requests again."""
        logger.warning("the rank group was lost: %s", loss)
        self._on_state(EngineState.RECOVERING)
        # A survivor may hold states of the plan that failed: all ranks forget and start alike.
        self._admissions.clear()
        for job_id, active in list(self._active.items()):
            active.attempt += 1
            if active.attempt > MAX_ATTEMPTS:
                error = JobInternalError.new()
                logger.error(
                    "job failed: the rank group was lost %d times while it ran: %s",
                    MAX_ATTEMPTS,
                    loss,
                    extra={
                        "job_id": job_id,
                        "request_id": active.request.request_id,
                        "error_id": error.error_id,
                    },
                )
                self._fail(job_id, error)
                continue
            self._scheduler.restart(job_id)
            self._admissions.append(job_id)
            active.request.on_event(RequestRestarted(active.attempt, str(loss), 0))
        await self._bring_back()
        self._on_state(EngineState.SERVING)

    async def _bring_back(self) -> None:
        failures = 0
        while True:
            try:
                replaced = await self._group.recover()
            except RankDiedError as loss:
                reason = str(loss)
            else:
                logger.info(
                    "the rank group is back: generation %d, replaced %s", self._group.generation, replaced
                )
                return
            self._on_state(EngineState.FAILED)
            pause_seconds = RECOVERY_PAUSE_SECONDS[min(failures, len(RECOVERY_PAUSE_SECONDS) - 1)]
            failures += 1
            logger.error("the rank group does not come back: %s; next try in %g s", reason, pause_seconds)
            await asyncio.sleep(pause_seconds)


def _error_of(fault: JobFault) -> JobError:
    if fault.kind == OutOfDeviceMemoryError.__name__:
        return OutOfDeviceMemoryError(fault.job_id)
    return JobInternalError(fault.error_id)
