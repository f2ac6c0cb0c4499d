"""The engine's loop: plan a round, let the ranks do it, tell the requests, recover when ranks die."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import partial

from hidream_grpc.engine.admissions import Admissions
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import JobFault, PlanDone, StepPlan
from hidream_grpc.engine.recovery import bring_back, committed_snapshots
from hidream_grpc.engine.requests import (
    Backlog,
    EngineRequest,
    EngineState,
    ImageFinished,
    PreviewMade,
    PromptReport,
    PromptsEncoded,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
    RequestStarted,
    SnapshotTaken,
    StepFinished,
    StepReport,
)
from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from hidream_grpc.engine.scheduler import StepScheduler
from hidream_grpc.engine.snapshot_schedule import SnapshotPace
from hidream_grpc.engine.suspects import Strikes
from hidream_grpc.errors import (
    JobError,
    JobInternalError,
    LossCause,
    NonFiniteError,
    OutOfDeviceMemoryError,
    RankDiedError,
    SnapshotError,
)

logger = logging.getLogger(__name__)

SNAPSHOT_REFUSED_REASON = "its snapshot cannot be used"
OUT_OF_MEMORY_REASON = "did not fit the memory of the device beside others"


class Controller:
    """Runs requests on a rank group, one denoising step of all of them at a time.

    All methods belong to the event loop's thread. `run` owns the group: it starts it, recovers it
    and stops it.

    Attributes:
        num_lost_steps: denoising steps that requests took again after the group was lost.
    """

    def __init__(
        self,
        group: RankGroup,
        scheduler: StepScheduler,
        step_observers: Sequence[Callable[[StepReport], None]],
        prompt_observers: Sequence[Callable[[PromptReport], None]],
    ) -> None:
        self.num_lost_steps = 0
        self._group = group
        self._scheduler = scheduler
        self._step_observers = step_observers
        self._prompt_observers = prompt_observers
        self._strikes = Strikes()
        self._pace = SnapshotPace()
        self._active: dict[str, RunningRequest] = {}
        self._admissions = Admissions()
        self._wake = asyncio.Event()
        self._next_plan_id = 1
        # Of the latest step of any job.
        self._step_seconds: float | None = None
        self._round_start = 0.0

    def notify(self) -> None:
        """Say that the backlog has a request."""
        self._wake.set()

    def cancel(self, claim_id: str) -> None:
        """Drop a running request: it takes no further step and reports nothing more."""
        if self._active.pop(claim_id, None) is not None:
            self._forget(claim_id)

    async def run(self, backlog: Backlog) -> None:
        """Start the group and work off the backlog until cancelled; then nothing of the group is left.

        Raises:
            RankDiedError: the group could not be started at all.
            StartupError: the ranks said why they cannot start.
        """
        try:
            _set_state(backlog, EngineState.STARTING)
            await self._group.start()
            _set_state(backlog, EngineState.SERVING)
            while True:
                await self._round(backlog)
        finally:
            _set_state(backlog, EngineState.STOPPED)
            await self._group.stop()

    async def _round(self, backlog: Backlog) -> None:
        self._round_start = time.monotonic()
        plan = self._plan(backlog)
        # What is lost with the plan, and may have caused it.
        at_work = self._at_work(plan)
        try:
            if plan is None:
                await self._wait_for_work()
                return
            answers = await self._group.execute(plan)
            ran_out = self._apply(plan, answers)
            for claim_id in ran_out & self._active.keys():
                await self._retry_alone(claim_id, at_work)
        except RankDiedError as loss:
            lost = loss
        else:
            return
        await self._recover(backlog, lost, plan, at_work)

    # --- planning ---------------------------------------------------------------------------------

    def _plan(self, backlog: Backlog) -> StepPlan | None:
        suspect = self._strikes.suspect
        while suspect is None and self._scheduler.has_capacity and (request := backlog.take()) is not None:
            self._start(request)
        admissions = self._admissions.take(self._active, suspect)
        releases = self._admissions.releases(self._active, admissions)
        ready = self._admissions.ready(admissions)
        if suspect is not None:
            ready &= {suspect}
        step_claims = self._scheduler.next_step(ready)
        decodes = self._scheduler.next_decodes(self._group.world_size, ready)
        if not (step_claims or decodes or releases or admissions or self._scheduler.decoding):
            return None
        plan = StepPlan(
            plan_id=self._next_plan_id,
            releases=releases,
            admissions=admissions,
            step_claims=step_claims,
            snapshot_claim=self._pace.next_claim(step_claims),
            decodes=decodes,
            decode_budget_seconds=self._decode_budget_seconds(step_claims),
        )
        self._next_plan_id += 1
        self._scheduler.planned(decodes)
        self._admissions.planned(plan)
        return plan

    def _at_work(self, plan: StepPlan | None) -> dict[str, int]:
        """The progress of each job that the ranks do something for in a plan."""
        if plan is None:
            return {}
        jobs = (*plan.step_claims, *(a.claim_id for a in plan.admissions), *self._scheduler.decoding)
        return {claim_id: self._scheduler.progress_of(claim_id) for claim_id in jobs}

    def _decode_budget_seconds(self, step_claims: tuple[str, ...]) -> float | None:
        """One step time of those that step, so that a decode at most doubles their wait, but for a slice.

        A round without a step has a budget too: a request may arrive meanwhile.
        """
        known = (self._active[claim_id].step_seconds for claim_id in step_claims)
        return min((seconds for seconds in known if seconds is not None), default=self._step_seconds)

    def _start(self, request: EngineRequest) -> None:
        active = RunningRequest.start(request, self._group.checkpoint_fingerprint)
        self._active[request.claim_id] = active
        self._scheduler.admit(
            request.claim_id, request.parameters, active.resume_step, request.finished_images
        )
        self._admissions.ask(request.claim_id)
        request.on_event(RequestStarted())

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

    # --- what a round brought ---------------------------------------------------------------------

    def _apply(self, plan: StepPlan, answers: tuple[PlanDone, ...]) -> set[str]:
        """Tell each request what the round brought it; returns those that had no room on the device."""
        self._admissions.done(plan)
        if plan.admissions:
            # Every rank counts the same prompts.
            counts = answers[0]
            prompts = PromptReport(counts.num_prompt_cache_hits, counts.num_prompt_cache_misses)
            for observe in self._prompt_observers:
                observe(prompts)
        encode_seconds = max(answer.encode_seconds for answer in answers)
        for admission in plan.admissions:
            if active := self._active.get(admission.claim_id):
                active.request.on_event(PromptsEncoded(encode_seconds))
        faults = {fault.claim_id: fault for answer in answers for fault in answer.faults}
        ran_out = {fault.claim_id for fault in faults.values() if _is_out_of_memory(fault)}
        refused = {fault.claim_id: fault.reason for fault in faults.values() if _is_refused_snapshot(fault)}
        for fault in faults.values():
            if fault.claim_id not in ran_out | refused.keys():
                self._fail_for(fault)
        if plan.step_claims:
            self._apply_step(plan, answers, not_stepped=ran_out | refused.keys())
        for claim_id, reason in refused.items():
            if active := self._active.get(claim_id):
                active.start_over(reason)
                self._restart(claim_id, SNAPSHOT_REFUSED_REASON)
        for image in (image for answer in answers for image in answer.images):
            self._scheduler.decoded(image.claim_id, image.image_index)
            if active := self._active.get(image.claim_id):
                self._note_progress(image.claim_id)
                active.request.on_event(ImageFinished(image.image_index, image.data, image.decode_seconds))
                if self._scheduler.is_finished(image.claim_id):
                    self._finish(image.claim_id)
        return ran_out

    def _apply_step(self, plan: StepPlan, answers: tuple[PlanDone, ...], not_stepped: Set[str]) -> None:
        step_seconds = max(answer.step_seconds for answer in answers)
        previews = {preview.claim_id: preview.data for answer in answers for preview in answer.previews}
        stepped = tuple(j for j in plan.step_claims if j in self._active and j not in not_stepped)
        self._step_seconds = step_seconds
        with self._rise_logged():
            self._scheduler.stepped(stepped)
        self._pace.stepped(stepped, step_seconds)
        num_samples = 0
        for claim_id in stepped:
            active = self._active[claim_id]
            step = self._scheduler.step_of(claim_id)
            num_samples += active.request.parameters.num_samples
            active.step_seconds = step_seconds
            self._note_progress(claim_id)
            active.request.on_event(StepFinished(step, step_seconds))
            if claim_id in previews:
                active.request.on_event(PreviewMade(step, previews[claim_id]))
        if stepped:
            parameters = self._active[stepped[0]].request.parameters
            report = StepReport(
                step_seconds=step_seconds,
                width=parameters.width,
                height=parameters.height,
                num_samples=num_samples,
                snapshot_seconds=self._apply_snapshot(answers),
                round_seconds=self._plain_round_seconds(plan),
            )
            for observe in self._step_observers:
                observe(report)

    def _plain_round_seconds(self, plan: StepPlan) -> float | None:
        """How long the round has taken, if it was for a step alone."""
        if plan.admissions or self._scheduler.decoding:
            return None
        return time.monotonic() - self._round_start

    def _apply_snapshot(self, answers: tuple[PlanDone, ...]) -> float:
        """Keep the snapshot that came with a step; returns what it cost, in seconds."""
        cost_seconds = 0.0
        for snapshot in filter(None, (answer.snapshot for answer in answers)):
            if active := self._active.get(snapshot.claim_id):
                active.snapshot = Snapshot(snapshot.step, snapshot.data)
                active.request.on_event(SnapshotTaken(snapshot.step, snapshot.data))
                cost_seconds += self._pace.taken(
                    snapshot.claim_id, snapshot.snapshot_seconds, len(snapshot.data)
                )
        return cost_seconds

    def _note_progress(self, claim_id: str) -> None:
        self._strikes.progressed(claim_id, self._scheduler.progress_of(claim_id))

    def _finish(self, claim_id: str) -> None:
        active = self._active.pop(claim_id)
        self._forget(claim_id)
        active.request.on_event(RequestFinished())

    def _fail(self, claim_id: str, error: JobError) -> None:
        if active := self._active.pop(claim_id, None):
            self._forget(claim_id)
            active.request.on_event(RequestFailed(error))

    def _fail_for(self, fault: JobFault) -> None:
        """Fail a job for a fault of its own; log what the ranks have not."""
        active = self._active.get(fault.claim_id)
        error = JobInternalError(fault.error_id) if fault.error_id else JobInternalError.new()
        if active is not None and fault.kind == NonFiniteError.__name__:
            logger.error(
                "job failed: %s", fault.reason, extra=active.log_fields | {"error_id": error.error_id}
            )
        self._fail(fault.claim_id, error)

    def _forget(self, claim_id: str) -> None:
        self._scheduler.release(claim_id)
        self._strikes.forget(claim_id)
        self._pace.forget(claim_id)
        # Even an idle group must be told, or the ranks keep the latents.
        self._wake.set()

    # --- when something went wrong ----------------------------------------------------------------

    async def _retry_alone(self, claim_id: str, at_work: dict[str, int]) -> None:
        """Start a job again that had no room, without others beside it; fail one that was alone before."""
        suspects = {claim_id: at_work[claim_id]}
        logger.warning("job %s", OUT_OF_MEMORY_REASON, extra=self._active[claim_id].log_fields)
        self._judge(suspects, OUT_OF_MEMORY_REASON, LossCause.OUT_OF_MEMORY, was_alone=at_work == suspects)
        await self._resume((claim_id,), OUT_OF_MEMORY_REASON)

    async def _recover(
        self, backlog: Backlog, loss: RankDiedError, plan: StepPlan | None, at_work: dict[str, int]
    ) -> None:
        """Bring the group back, however long it takes, and let the running requests go on."""
        logger.warning("the rank group was lost: %s", loss)
        _set_state(backlog, EngineState.RECOVERING)
        if plan is not None and loss.cause is LossCause.OUT_OF_MEMORY:
            self._scheduler.lower_limit(plan.step_claims)
            logger.warning("a step may hold %d pixels from now on", self._scheduler.max_step_pixels)
        suspects = {claim_id: progress for claim_id, progress in at_work.items() if claim_id in self._active}
        if suspects and loss.cause is not LossCause.OUTSIDE:
            self._judge(suspects, str(loss), loss.cause, was_alone=len(at_work) == 1)
        # A survivor may hold states of the plan that failed: all ranks forget, and start alike.
        self._admissions.forget_all()
        is_back = False
        while not is_back:
            await bring_back(self._group, partial(_set_state, backlog), self._keep_snapshots)
            try:
                await self._resume(tuple(self._active), str(loss))
                is_back = True
            except RankDiedError as another_loss:
                logger.warning("the rank group was lost again: %s", another_loss)
        if loss.cause is not LossCause.OUT_OF_MEMORY:
            with self._rise_logged():
                self._scheduler.lift_limit()
        _set_state(backlog, EngineState.SERVING)

    @contextmanager
    def _rise_logged(self) -> Iterator[None]:
        """Log it when a step may hold more after the block than before."""
        before = self._scheduler.max_step_pixels
        yield
        if self._scheduler.max_step_pixels > before:
            logger.info("a step may hold %d pixels again", self._scheduler.max_step_pixels)

    async def _keep_snapshots(self) -> None:
        """Take what the ranks have before they go."""
        steps = {claim_id: self._scheduler.step_of(claim_id) for claim_id in self._active}
        try:
            for claim_id, snapshot in (await committed_snapshots(self._group, steps)).items():
                if active := self._active.get(claim_id):
                    active.snapshot = snapshot
        except RankDiedError as loss:
            logger.warning("running jobs may lose steps: %s", loss)

    def _judge(self, suspects: dict[str, int], reason: str, cause: LossCause, *, was_alone: bool) -> None:
        """Find out whether a job is to blame for what went wrong, and fail it then."""
        guilty = self._strikes.strike(suspects, was_alone=was_alone)
        if guilty is None:
            logger.warning("jobs that may have caused it go on one by one: %d", len(suspects))
            return
        internal_error = JobInternalError.new()
        job_id = self._active[guilty].request.job_id
        logger.error(
            "job failed: the rank group was lost while it ran alone: %s",
            reason,
            extra=self._active[guilty].log_fields | {"error_id": internal_error.error_id},
        )
        is_out_of_memory = cause is LossCause.OUT_OF_MEMORY
        self._fail(guilty, OutOfDeviceMemoryError(job_id) if is_out_of_memory else internal_error)

    async def _resume(self, claim_ids: tuple[str, ...], reason: str) -> None:
        """Have jobs go on from where they are, as far as that is still known; raises RankDiedError."""
        steps = {
            claim_id: self._scheduler.step_of(claim_id) for claim_id in claim_ids if claim_id in self._active
        }
        snapshots = await committed_snapshots(self._group, steps)
        for claim_id in steps:
            active = self._active.get(claim_id)
            if active is None:
                continue
            active.snapshot = snapshots.get(claim_id, active.snapshot)
            self._restart(claim_id, reason)

    def _restart(self, claim_id: str, reason: str) -> None:
        """Have a job go on from its snapshot, or its seed where it has none."""
        active = self._active[claim_id]
        active.attempt += 1
        self.num_lost_steps += self._scheduler.step_of(claim_id) - active.resume_step
        self._scheduler.restart(claim_id, active.resume_step)
        self._admissions.ask(claim_id)
        active.request.on_event(RequestRestarted(active.attempt, reason, active.resume_step))


def _set_state(backlog: Backlog, state: EngineState) -> None:
    logger.info("the engine is %s", state)
    backlog.set_engine_state(state)


def _is_out_of_memory(fault: JobFault) -> bool:
    return fault.kind == OutOfDeviceMemoryError.__name__


def _is_refused_snapshot(fault: JobFault) -> bool:
    return fault.kind == SnapshotError.__name__
