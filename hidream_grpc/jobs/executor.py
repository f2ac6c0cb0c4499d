"""Claims jobs for the engine of this server, keeps the claims, and sees the jobs to their ends."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from hidream_grpc.engine.requests import EngineRequest
from hidream_grpc.errors import ClaimLostError, StoreFullError, StoreUnavailableError
from hidream_grpc.jobs.feeds import JobFeeds
from hidream_grpc.jobs.job import CancelReason, Job
from hidream_grpc.jobs.outages import Outage
from hidream_grpc.jobs.pauses import wait_at_most
from hidream_grpc.jobs.running_job import HEAL_SECONDS, TRANSIENT_ERRORS, JobTools, RunningJob

logger = logging.getLogger(__name__)

RELEASE_SECONDS = 5.0


class Engine(Protocol):
    """What the executor asks of the engine (`engine/controller.py`)."""

    def notify(self) -> None:
        """Say that a job waits."""

    def cancel(self, job_id: str) -> None:
        """Drop a running job at its next step."""


@dataclass(frozen=True, slots=True)
class ClaimLimits:
    """How many jobs are claimed, and how long a claim lasts without being renewed."""

    max_running_jobs: int
    max_running_jobs_of_caller: int | None
    lease_seconds: float


class JobExecutor:
    """The engine's backlog. Belongs to the event loop's thread.

    Args:
        may_claim: whether the engine can work.
        on_change: called when a job was claimed or is held no more, with it as it is then.
    """

    def __init__(
        self,
        engine: Engine,
        feeds: JobFeeds,
        tools: JobTools,
        limits: ClaimLimits,
        may_claim: Callable[[], bool],
        on_change: Callable[[Job], None],
    ) -> None:
        self._engine = engine
        self._feeds = feeds
        self._tools = tools
        self._limits = limits
        self._may_claim = may_claim
        self._on_change = on_change
        self._replica_id = uuid.uuid4().hex
        self._held: dict[str, RunningJob] = {}
        self._requests: deque[tuple[RunningJob, EngineRequest]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._renew_time = time.monotonic()
        self._is_claiming = False
        self._cancelled_meanwhile: dict[str, CancelReason] = {}
        self._is_closed = False

    @property
    def num_held(self) -> int:
        """Jobs that are claimed now."""
        return len(self._held)

    def job(self, job_id: str) -> Job | None:
        """A job as it is here and now; None when it is not claimed here."""
        running = self._held.get(job_id)
        return None if running is None else running.job

    def notify(self) -> None:
        """Say that there may be something to claim."""
        self._wake.set()

    def cancel(self, job_id: str, reason: CancelReason) -> None:
        """Stop a job, where it is claimed here."""
        if running := self._held.get(job_id):
            running.cancel(reason)
            self._engine.cancel(job_id)
        elif self._is_claiming:
            # It may be claimed already, and not yet known here.
            self._cancelled_meanwhile[job_id] = reason

    def take(self) -> EngineRequest | None:
        """The engine's next job (`engine.requests.Backlog`)."""
        while self._requests:
            running, request = self._requests.popleft()
            if not running.is_stopped:
                self._tools.outlook.note_taken(running.job)
                return request
        return None

    async def run(self) -> None:
        """Claim and renew until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._claim_forever())
            tasks.create_task(self._renew_forever())

    async def release_all(self) -> None:
        """Claim nothing more, and give back what is claimed, for somebody else or after a restart."""
        self._is_closed = True
        for job_id, running in tuple(self._held.items()):
            running.give_back()
            self._engine.cancel(job_id)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=RELEASE_SECONDS)

    # --- claims -----------------------------------------------------------------------------------

    async def _claim_forever(self) -> None:
        outage = Outage(logger, "claim jobs")
        while True:
            self._wake.clear()
            try:
                await self._claim()
                outage.note_success()
            except (StoreUnavailableError, StoreFullError) as error:
                outage.note_failure(error)
                await asyncio.sleep(HEAL_SECONDS)
                continue
            # A lease that runs out tells nobody.
            await wait_at_most(self._wake, self._limits.lease_seconds / 3)

    async def _claim(self) -> None:
        room = self._limits.max_running_jobs - len(self._held)
        if self._is_closed or room <= 0 or not self._may_claim():
            return
        if time.monotonic() - self._renew_time > self._limits.lease_seconds / 2:
            # What ran out while the store was lost is ours, unless somebody else has taken it.
            await self._renew()
        self._is_claiming = True
        try:
            jobs = await self._tools.store.claim(
                self._replica_id, self._limits.lease_seconds, room, self._limits.max_running_jobs_of_caller
            )
            for job in jobs:
                self._hold(job)
        finally:
            self._is_claiming = False
            self._cancelled_meanwhile.clear()

    def _hold(self, job: Job) -> None:
        job_id = job.job_id
        if stale := self._held.get(job_id):
            # Our own lease ran out while this process stood still.
            stale.lose()
            self._engine.cancel(job_id)
        resources = ExitStack()
        feed = resources.enter_context(self._feeds.used(job_id, is_reader=False))
        running = RunningJob(job, feed, self._tools)
        self._held[job_id] = running
        # Whoever is taken at once has had a place, too.
        feed.tell_first_place()
        if reason := self._cancelled_meanwhile.get(job_id):
            running.cancel(reason)
        if self._is_closed:
            running.give_back()
        self._on_change(job)
        task = asyncio.create_task(self._see_to_its_end(running, resources))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_to_its_end(self, running: RunningJob, resources: ExitStack) -> None:
        job_id = running.job.job_id
        with resources:
            try:
                if request := await running.engine_request():
                    self._requests.append((running, request))
                    self._engine.notify()
                await self._run(running)
            finally:
                if self._held.get(job_id) is running:
                    del self._held[job_id]
                    self._tools.outlook.note_gone(job_id)
                self._on_change(running.job)
                self._wake.set()

    async def _run(self, running: RunningJob) -> None:
        job = running.job
        log_fields = {"job_id": job.job_id, "request_id": job.submission.request_id}
        try:
            await running.run()
        except ClaimLostError:
            logger.warning("job is another's by now", extra=log_fields)
            if self._held.get(job.job_id) is running:
                self._engine.cancel(job.job_id)
        except TRANSIENT_ERRORS as error:
            logger.warning("job could not be given back: %s", error, extra=log_fields)
        except Exception:
            # Whatever it is: a job must end.
            self._engine.cancel(job.job_id)
            error_id = (await running.fail()).error_id
            logger.exception("job failed", extra=log_fields | {"error_id": error_id})
        else:
            if running.job.state.has_ended:
                self._engine.cancel(job.job_id)
                total_seconds = round(running.job.timings.total_seconds, 3)
                logger.info(
                    "job %s",
                    running.job.state.lower(),
                    extra=log_fields | {"total_seconds": total_seconds},
                )

    async def _renew_forever(self) -> None:
        interval_seconds = self._limits.lease_seconds / 3
        outage = Outage(logger, "renew claims")
        while True:
            start = time.monotonic()
            try:
                await self._renew()
                outage.note_success()
            except (StoreUnavailableError, StoreFullError) as error:
                outage.note_failure(error)
                await asyncio.sleep(HEAL_SECONDS)
                continue
            await asyncio.sleep(max(0.0, start + interval_seconds - time.monotonic()))

    async def _renew(self) -> None:
        held = dict(self._held)
        now = time.monotonic()
        if not held:
            self._renew_time = now
            return
        claims = await self._tools.store.renew(self._replica_id, held.keys(), self._limits.lease_seconds)
        self._renew_time = now
        kept = {claim.job_id: claim for claim in claims}
        for job_id, running in held.items():
            claim = kept.get(job_id)
            if claim is None or claim.claim_number != running.job.claim_number:
                if not running.job.state.has_ended:
                    running.lose()
                    self._engine.cancel(job_id)
            elif claim.cancel_reason is not None:
                self.cancel(job_id, claim.cancel_reason)
