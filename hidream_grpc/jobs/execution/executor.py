"""Claims jobs for the engine of this server, and sees them to their ends."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from hidream_grpc.background import BackgroundTasks, keep_doing
from hidream_grpc.engine.requests import EngineEvent, EngineRequest, StepFinished
from hidream_grpc.errors import ClaimLostError
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.execution.running_job import RunningJob
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.retrying import TRANSIENT_ERRORS, wait_at_most
from hidream_grpc.jobs.store.records import HeldClaim
from hidream_grpc.jobs.store.step_room import MAX_CONSIDERED_JOBS, StepRoom
from hidream_grpc.jobs.watching.feeds import JobFeeds
from hidream_grpc.model.parameters import SampleSize
from hidream_grpc.traces import enter_trace

logger = logging.getLogger(__name__)

RELEASE_SECONDS = 2.0
LOOK_SECONDS = 5.0
"""Seconds between two tries to claim without a notice of jobs, and between two checks of the claims."""


class Engine(Protocol):
    """What the executor asks of the engine (`engine/controller.py`)."""

    def notify(self) -> None:
        """Say that a job waits."""

    def cancel(self, claim_id: str) -> None:
        """Drop a running request at its next step; nothing happens when there is none."""


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """How many jobs are claimed, and of which model.

    Attributes:
        max_running_jobs: jobs of a priority or a higher one; the pixels of a step allow fewer.
        max_running_jobs_of_caller: jobs of one caller; None for any number.
    """

    max_running_jobs: int
    max_running_jobs_of_caller: int | None
    model_fingerprint: str


class JobExecutor:
    """The jobs that this server has claimed, for the engine. Belongs to the event loop's thread.

    Args:
        replica_id: gives the id of this server as it is registered now.
        may_claim: whether the engine can work.
        on_change: called when a job was claimed or is held no more, with it as it is then.
        on_lost: called when a claim was lost, with its job.
        capacity: of the engine, as it is now: as many jobs are claimed as a step serves.
    """

    def __init__(
        self,
        engine: Engine,
        feeds: JobFeeds,
        tools: JobTools,
        limits: ClaimLimits,
        replica_id: Callable[[], str],
        may_claim: Callable[[], bool],
        on_change: Callable[[Job], None],
        on_lost: Callable[[Job], Coroutine[None, None, None]],
        capacity: Callable[[], EngineCapacity],
    ) -> None:
        self._capacity = capacity
        self._engine = engine
        self._feeds = feeds
        self._tools = tools
        self._limits = limits
        self._replica_id = replica_id
        self._may_claim = may_claim
        self._on_change = on_change
        self._on_lost = on_lost
        self._held: dict[str, RunningJob] = {}
        self._requests: deque[tuple[RunningJob, EngineRequest]] = deque()
        self._tasks = BackgroundTasks()
        self._wake = asyncio.Event()
        self._claiming = asyncio.Lock()
        # Of jobs that may be claimed at this moment, and are not yet known here.
        self._early_cancels: dict[str, CancelReason] = {}
        self._is_closed = False
        self._latest_room = StepRoom((), limits.max_running_jobs, 0)

    @property
    def num_held(self) -> int:
        """Number of jobs that are claimed by this server now."""
        return len(self._held)

    def job(self, job_id: str) -> Job | None:
        """The newest state of a job that is claimed here; None when it is not."""
        running = self._held.get(job_id)
        return None if running is None else running.job

    def notify(self, priority: int | None = None) -> None:
        """Say that a job may wait that did not before, and of which priority it is where that is known."""
        # A job that has ended since this room was made has set the event itself.
        if priority is None or self._latest_room.may_run(priority):
            self._wake.set()

    def notify_changed(self, job_id: str) -> None:
        """Say that a job was written. Where it ended at another replica, its caller may run another one."""
        if self._limits.max_running_jobs_of_caller is not None and job_id not in self._held:
            self._wake.set()

    def cancel(self, job_id: str, reason: CancelReason) -> None:
        """Stop a job, where it is claimed here."""
        if running := self._held.get(job_id):
            running.cancel(reason)
            self._engine.cancel(running.claim_id)
        elif self._claiming.locked():
            self._early_cancels[job_id] = reason

    def note_claim(self, job_id: str, claim_number: int) -> None:
        """Note that this is a job's newest claim, here or elsewhere."""
        running = self._held.get(job_id)
        if running is not None and running.job.claim_number < claim_number:
            self._lose(running)

    def lose_all(self) -> None:
        """Note that this replica was removed as dead: its claims are lost."""
        for running in self._held.values():
            self._lose(running)

    @property
    def waiting_sizes(self) -> Collection[SampleSize]:
        """Sizes of jobs for which there was no room (`engine.requests.Backlog`)."""
        return self._latest_room.refused_sizes

    def take(self) -> EngineRequest | None:
        """The engine's next job (`engine.requests.Backlog`)."""
        while self._requests:
            running, request = self._requests.popleft()
            if running.is_running:
                self._tools.estimator.note_taken(running.job)
                return request
        return None

    async def run(self) -> None:
        """Claim until cancelled, and give back what the store says is claimed here and is not."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(
                keep_doing("claim jobs", self._claim, lambda: wait_at_most(self._wake, LOOK_SECONDS))
            )
            tasks.create_task(
                keep_doing("look at its claims", self._check_claims, lambda: asyncio.sleep(LOOK_SECONDS))
            )

    async def release_all(self) -> None:
        """Claim nothing more, and give back what is claimed, for another replica or after a restart."""
        self._is_closed = True
        for running in tuple(self._held.values()):
            running.give_back()
            self._engine.cancel(running.claim_id)
        await self._tasks.wait(RELEASE_SECONDS)

    # --- claims -----------------------------------------------------------------------------------

    async def _claim(self) -> None:
        self._wake.clear()
        if self._is_closed or not self._may_claim():
            return
        async with self._claiming:
            try:
                jobs = await self._tools.store.claim(
                    self._replica_id(),
                    self._limits.model_fingerprint,
                    MAX_CONSIDERED_JOBS,
                    self._limits.max_running_jobs_of_caller,
                    self._room,
                )
                for job in jobs:
                    self._hold(job)
                if jobs:
                    # There may be room for those behind them.
                    self._wake.set()
            finally:
                self._early_cancels.clear()

    def _room(self) -> StepRoom:
        capacity = self._capacity()
        self._latest_room = StepRoom(
            (running.demand for running in self._held.values()),
            self._limits.max_running_jobs,
            capacity.max_step_pixels,
            capacity.step_pixels_by_size,
        )
        return self._latest_room

    async def _check_claims(self) -> None:
        """Make up for answers of the store, and for cancellations, that were lost on their way."""
        async with self._claiming:
            replica_id = self._replica_id()
            for claim in await self._tools.store.held(replica_id):
                running = self._held.get(claim.job_id)
                if running is None or running.job.claim_number != claim.claim_number:
                    await self._give_up(replica_id, claim)
                elif claim.cancel_reason is not None:
                    self.cancel(claim.job_id, claim.cancel_reason)

    async def _give_up(self, replica_id: str, claim: HeldClaim) -> None:
        """Give back a claim whose answer was lost, or that could not be given back before."""
        logger.warning("giving back a job that does not run here", extra={"job_id": claim.job_id})
        await self._tools.store.abandon(replica_id, claim)

    def _hold(self, job: Job) -> None:
        job_id = job.job_id
        self.note_claim(job_id, job.claim_number)
        resources = ExitStack()
        feed = resources.enter_context(self._feeds.used(job_id, is_reader=False))
        running = RunningJob(job, feed, self._tools)
        self._held[job_id] = running
        # A job that is claimed at once has had a position, too.
        feed.publish_first_position()
        if reason := self._early_cancels.get(job_id):
            running.cancel(reason)
        if self._is_closed:
            running.give_back()
        self._on_change(job)
        self._tasks.start(self._see_to_its_end(running, resources), f"run job {job_id}")

    async def _see_to_its_end(self, running: RunningJob, resources: ExitStack) -> None:
        job_id = running.job.job_id
        enter_trace(running.job.trace)
        with resources:
            try:
                if request := await running.engine_request():
                    on_event = partial(self._receive, running)
                    self._requests.append((running, replace(request, on_event=on_event)))
                    self._engine.notify()
                await self._run(running)
            finally:
                self._engine.cancel(running.claim_id)
                if self._held.get(job_id) is running:
                    del self._held[job_id]
                    self._tools.estimator.note_gone(job_id)
                self._on_change(running.job)
                self._wake.set()

    def _receive(self, running: RunningJob, event: EngineEvent) -> None:
        running.receive(event)
        if isinstance(event, StepFinished) and running.demand.num_steps == 0:
            # While its images are decoded another one may step.
            self._wake.set()

    async def _run(self, running: RunningJob) -> None:
        job = running.job
        facts = {"job_id": job.job_id, "request_id": job.submission.request_id}
        try:
            await running.run()
        except ClaimLostError:
            logger.warning("job is another's by now", extra=facts)
            self._tasks.start(self._on_lost(running.job), f"clean up after job {job.job_id}")
        except TRANSIENT_ERRORS as error:
            logger.warning("job could not be given back: %s", error, extra=facts)
        else:
            if running.job.state.has_ended:
                total_seconds = round(running.job.timings.total_seconds, 3)
                extra = {**facts, "caller": job.submission.caller, "total_seconds": total_seconds}
                logger.info("job %s", running.job.state.lower(), extra=extra)

    def _lose(self, running: RunningJob) -> None:
        running.lose()
        self._engine.cancel(running.claim_id)
