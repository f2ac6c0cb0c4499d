"""The engine's loop: schedule a round, execute it, report to the requests; recover from losses of ranks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from hidream_grpc.background import BackgroundTasks
from hidream_grpc.engine.admissions import held_after, note_admissions
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.protocol.messages import PlanDone
from hidream_grpc.engine.reporting import Faults, fail, fail_for, report_images, report_prompts, report_step
from hidream_grpc.engine.requests import Backlog, EngineState, PromptReport, RequestStarted, StepReport
from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from hidream_grpc.engine.scheduler import Round, note_decodes, schedule, step_pixels
from hidream_grpc.engine.snapshot_schedule import SnapshotBudget
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.engine.step_limit_file import StepLimitFile, StepLimitKey
from hidream_grpc.engine.suspects import attribute, find_suspect
from hidream_grpc.errors import JobInternalError, LossCause, OutOfDeviceMemoryError, RankDiedError

logger = logging.getLogger(__name__)

RECOVERY_PAUSE_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
SNAPSHOT_REFUSED_REASON = "its snapshot cannot be used"
OUT_OF_MEMORY_REASON = "did not fit the memory of the device beside others"


class Controller:
    """Runs requests on a rank group, one denoising step of all of them at a time.

    All methods belong to the event loop's thread. `run` owns the group: it starts it, recovers it
    and stops it.

    Args:
        group: not started yet.
        step_limit: lowered when a step does not fit the devices, or is longer than pays.
        step_limit_file: keeps what was learnt of it.
        step_observers: called after each denoising step.
        prompt_observers: called when the prompts of new requests are encoded.

    Attributes:
        num_lost_steps: denoising steps that requests took again after they were restarted.
    """

    def __init__(
        self,
        group: RankGroup,
        step_limit: StepLimit,
        step_limit_file: StepLimitFile,
        step_observers: Sequence[Callable[[StepReport], None]],
        prompt_observers: Sequence[Callable[[PromptReport], None]],
    ) -> None:
        self.num_lost_steps = 0
        self._group = group
        self._step_limit = step_limit
        self._step_limit_file = step_limit_file
        self._step_observers = step_observers
        self._prompt_observers = prompt_observers
        self._running: dict[str, RunningRequest] = {}
        # Claims that the ranks hold a state of, whether they still run or not.
        self._held: frozenset[str] = frozenset()
        self._snapshot_budget = SnapshotBudget()
        self._latest_step_seconds: float | None = None
        self._num_plans = 0
        self._tasks = BackgroundTasks()
        self._wake = asyncio.Event()

    def notify(self) -> None:
        """Say that the backlog has a request."""
        self._wake.set()

    def cancel(self, claim_id: str) -> None:
        """Drop a running request: it takes no further step and reports nothing more."""
        if self._running.pop(claim_id, None) is not None:
            # Even an idle group needs a plan that releases it, or the ranks keep the latents.
            self._wake.set()

    async def run(self, backlog: Backlog) -> None:
        """Start the group and work off the backlog until cancelled; then nothing of the group is left.

        Raises:
            RankDiedError: the group could not be started at all.
            StartupError: the ranks said why they cannot start.
        """
        try:
            _set_state(backlog, EngineState.STARTING)
            await self._group.start()
            await self._recall_step_limit()
            _set_state(backlog, EngineState.SERVING)
            while True:
                await self._round(backlog)
        finally:
            _set_state(backlog, EngineState.STOPPED)
            await self._group.stop()

    # --- a round ----------------------------------------------------------------------------------

    async def _round(self, backlog: Backlog) -> None:
        start_time = time.monotonic()
        self._take_requests(backlog)
        planned = self._schedule()
        try:
            if planned is None:
                await self._wait_for_work()
            else:
                answers = await self._group.execute(planned.plan)
                await self._report(backlog, planned, answers, start_time)
        except RankDiedError as error:
            loss = error
        else:
            return
        await self._recover(backlog, loss, planned)

    def _take_requests(self, backlog: Backlog) -> None:
        """Take all that the backlog has, unless a suspect runs alone."""
        if find_suspect(self._running) is not None:
            return
        while (request := backlog.take()) is not None:
            running = RunningRequest.start(request, self._group.checkpoint_fingerprint)
            self._running[request.claim_id] = running
            running.publish(RequestStarted())

    def _schedule(self) -> Round | None:
        self._num_plans += 1
        self._step_limit.know({request.size for request in self._running.values()})
        return schedule(
            self._running,
            self._held,
            plan_id=self._num_plans,
            world_size=self._group.world_size,
            max_step_pixels=self._step_limit.pixels,
            step_pixels_by_size=self._step_limit.by_size,
            snapshot_budget=self._snapshot_budget,
            latest_step_seconds=self._latest_step_seconds,
            now=time.monotonic(),
        )

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

    async def _report(
        self, backlog: Backlog, planned: Round, answers: tuple[PlanDone, ...], start_time: float
    ) -> None:
        """Report to each request what the round has brought; raises RankDiedError when a rank has died."""
        plan = planned.plan
        self._held = held_after(self._held, plan)
        note_admissions(self._running, plan.admissions)
        note_decodes(self._running, plan.decodes)
        if plan.admissions:
            prompts = report_prompts(self._running, plan, answers)
            for observe in self._prompt_observers:
                observe(prompts)
        faults = Faults.of(answers)
        for fault in faults.fatal:
            fail_for(self._running, fault)
        if plan.step_claims:
            self._report_step(backlog, planned, answers, faults, start_time)
        for claim_id, reason in faults.refused_snapshots.items():
            if request := self._running.get(claim_id):
                request.refuse_snapshot(reason)
                self._restart(request, SNAPSHOT_REFUSED_REASON)
        report_images(self._running, answers)
        for claim_id in faults.out_of_memory:
            # Callers may leave while another is asked for its snapshot.
            if claim_id in self._running:
                await self._retry_alone(claim_id, planned.at_work)

    def _report_step(
        self,
        backlog: Backlog,
        planned: Round,
        answers: tuple[PlanDone, ...],
        faults: Faults,
        start_time: float,
    ) -> None:
        plan = planned.plan
        stepped = [c for c in plan.step_claims if c in self._running and c not in faults.claim_ids]
        is_for_step_alone = not plan.admissions and not any(r.decoding for r in self._running.values())
        round_seconds = time.monotonic() - start_time if is_for_step_alone else None
        self._latest_step_seconds = max(answer.step_seconds for answer in answers)
        report = report_step(self._running, stepped, answers, self._snapshot_budget, round_seconds)
        if report is not None:
            if len(stepped) == len(plan.step_claims):
                leaves_out = planned.is_full or report.size in backlog.waiting_sizes
                self._learn(report, is_full=leaves_out)
            for observe in self._step_observers:
                observe(report)

    def _learn(self, report: StepReport, *, is_full: bool) -> None:
        """Learn from a step how many pixels are worth one; what is found is kept over a restart."""
        pixels = report.width * report.height * report.num_samples
        if self._step_limit.observe(report.size, pixels, report.round_seconds, is_full=is_full):
            self._tasks.start(
                self._step_limit_file.keep(self._step_limit), "keeping what was learnt of steps"
            )

    async def _recall_step_limit(self) -> None:
        """Begin with what was learnt on these devices before, unless they are the same as until now."""
        key = StepLimitKey(
            devices=tuple(rank.device.name for rank in self._group.loaded),
            checkpoint_fingerprint=self._group.checkpoint_fingerprint,
            layout=str(self._group.placement.layout),
            weights=self._group.weights.transformer,
        )
        await self._step_limit_file.recall(key, self._step_limit)

    # --- when something went wrong ----------------------------------------------------------------

    async def _retry_alone(self, claim_id: str, at_work: Mapping[str, int]) -> None:
        """Let a request that had no room go on alone; fail it if it was alone before."""
        in_question = {claim_id: at_work[claim_id]}
        logger.warning("job %s", OUT_OF_MEMORY_REASON, extra=self._running[claim_id].log_fields)
        was_alone = at_work == in_question
        self._attribute(in_question, OUT_OF_MEMORY_REASON, LossCause.OUT_OF_MEMORY, was_alone=was_alone)
        await self._resume((claim_id,), OUT_OF_MEMORY_REASON)

    async def _recover(self, backlog: Backlog, loss: RankDiedError, lost: Round | None) -> None:
        """Bring the group back, however long it takes, and let the running requests go on."""
        logger.warning("the rank group was lost: %s", loss)
        _set_state(backlog, EngineState.RECOVERING)
        at_work = {} if lost is None else lost.at_work
        if lost is not None and loss.cause is LossCause.OUT_OF_MEMORY:
            self._step_limit.run_out(step_pixels(self._running, lost.plan.step_claims))
        in_question = {c: progress for c, progress in at_work.items() if c in self._running}
        if in_question and loss.cause is not LossCause.OUTSIDE:
            self._attribute(in_question, str(loss), loss.cause, was_alone=len(at_work) == 1)
        # A survivor may hold states of the plan that failed: all ranks forget, and start alike.
        self._held = frozenset()
        is_back = False
        while not is_back:
            await self._bring_back(backlog)
            try:
                await self._resume(self._running, str(loss))
                is_back = True
            except RankDiedError as another_loss:
                logger.warning("the rank group was lost again: %s", another_loss)
        if loss.cause is not LossCause.OUT_OF_MEMORY:
            self._step_limit.lift()
        _set_state(backlog, EngineState.SERVING)

    async def _bring_back(self, backlog: Backlog) -> None:
        """Recover the group, however often it takes; between two tries the engine has failed."""
        num_failures = 0
        while True:
            try:
                replaced = await self._group.recover(self._keep_snapshots)
            except RankDiedError as loss:
                reason = str(loss)
            else:
                generation = self._group.generation
                logger.info("the rank group is back: generation %d, replaced %s", generation, replaced)
                await self._recall_step_limit()
                return
            _set_state(backlog, EngineState.FAILED)
            pause_seconds = RECOVERY_PAUSE_SECONDS[min(num_failures, len(RECOVERY_PAUSE_SECONDS) - 1)]
            num_failures += 1
            logger.error("the rank group does not come back: %s; next try in %g s", reason, pause_seconds)
            await asyncio.sleep(pause_seconds)

    def _attribute(
        self, in_question: Mapping[str, int], reason: str, cause: LossCause, *, was_alone: bool
    ) -> None:
        """Find out whether a request is the culprit of what went wrong, and fail it then."""
        culprit = attribute(self._running, in_question, was_alone=was_alone)
        if culprit is None:
            logger.warning("jobs that may have caused it go on one by one: %d", len(in_question))
            return
        internal_error = JobInternalError.new()
        request = self._running[culprit]
        logger.error(
            "job failed: the rank group was lost while it ran alone: %s",
            reason,
            extra=request.log_fields | {"error_id": internal_error.error_id},
        )
        is_out_of_memory = cause is LossCause.OUT_OF_MEMORY
        error = OutOfDeviceMemoryError(request.request.job_id) if is_out_of_memory else internal_error
        fail(self._running, culprit, error)

    async def _keep_snapshots(self) -> None:
        """Take the snapshots that the ranks have, before the ranks end."""
        try:
            await self._fetch_snapshots(self._running)
        except RankDiedError as loss:
            logger.warning("running jobs may lose steps: %s", loss)

    async def _resume(self, claim_ids: Iterable[str], reason: str) -> None:
        """Have requests go on from where they are, as far as that is still known; raises RankDiedError."""
        claim_ids = tuple(claim_ids)
        await self._fetch_snapshots(claim_ids)
        for claim_id in claim_ids:
            if request := self._running.get(claim_id):
                self._restart(request, reason)

    async def _fetch_snapshots(self, claim_ids: Iterable[str]) -> None:
        """Take what ranks have of requests after exactly the steps that count; raises RankDiedError."""
        for claim_id in tuple(claim_ids):
            request = self._running.get(claim_id)
            # A request at its seed needs none.
            if request is None or request.step == 0:
                continue
            if data := await self._group.snapshot_of(claim_id, request.step):
                request.snapshot = Snapshot(request.step, data)

    def _restart(self, request: RunningRequest, reason: str) -> None:
        self.num_lost_steps += request.restart(reason)


def _set_state(backlog: Backlog, state: EngineState) -> None:
    logger.info("the engine is %s", state)
    backlog.set_engine_state(state)
