"""The jobs of this service, for its callers: accept, show, follow, cancel, delete, read images."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hidream_grpc.background import keep_doing
from hidream_grpc.engine.requests import EngineRequest, EngineState
from hidream_grpc.errors import (
    DeadlineTooShortError,
    HiDreamError,
    RequestError,
    StoreUnavailableError,
    TooBusyForDeadlineError,
)
from hidream_grpc.jobs.artifacts.image_reader import ImageReader
from hidream_grpc.jobs.artifacts.orphans import OrphanedFiles
from hidream_grpc.jobs.counts import JobCounts
from hidream_grpc.jobs.deadlines import MIN_RETRY_SECONDS, deadline_refusal
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.executor import ClaimLimits, Engine, JobExecutor
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.intake import JobIntake
from hidream_grpc.jobs.job import CancelReason, Job, JobState, Submission, claim_sequence
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.readiness import Readiness, shutting_down
from hidream_grpc.jobs.replicas.attached_callers import AttachedCallers
from hidream_grpc.jobs.replicas.membership import LiveModel, Membership
from hidream_grpc.jobs.replicas.store_follower import StoreFollower
from hidream_grpc.jobs.retention.housekeeping import Housekeeping
from hidream_grpc.jobs.retention.retention import Retention, RetentionLimits, RetentionReport, remove_job
from hidream_grpc.jobs.store.records import AttachedCall, Page
from hidream_grpc.jobs.uninterrupted import RunningCalls
from hidream_grpc.jobs.watching.changed_jobs import ChangedJobs, JobChange
from hidream_grpc.jobs.watching.events import JobEvent, Queued
from hidream_grpc.jobs.watching.feeds import JobFeeds
from hidream_grpc.jobs.watching.queue_positions import QueueDurations, QueuePositions
from hidream_grpc.jobs.watching.state_changes import StateChanges
from hidream_grpc.model.parameters import SampleSize

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 1.0
"""Seconds that a call of the store which has begun still gets when the server ends."""
MAX_RESUMED_COUNTER = 2**31
"""A reader may say that it has seen so many events of a claim; there is room for as many more."""


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """Times and limits by which this server uses the store and its files.

    Attributes:
        lease_seconds: after so long without a heartbeat a replica is dead.
        retention: what is kept of jobs that have ended.
        orphan_sweep_seconds: between two looks for files that no job names.
        max_outage_seconds: a store may refuse everything for so long before this server is not ready.
    """

    lease_seconds: float
    retention: RetentionLimits
    orphan_sweep_seconds: float
    max_outage_seconds: float


class JobService:
    """Every call about jobs, and the engine's backlog.

    Belongs to the event loop's thread; `run` must run meanwhile.

    Attributes:
        executor: runs the jobs that this server has claimed.
        readiness: whether requests are taken.
    """

    def __init__(
        self,
        tools: JobTools,
        engine: Engine,
        model: LiveModel,
        limits: RequestLimits,
        policy: StorePolicy,
        observe_retention: Callable[[RetentionReport], None],
        observe_readiness: Callable[[bool], None],
        observe_late_refusal: Callable[[], None],
        capacity: Callable[[], EngineCapacity],
    ) -> None:
        self._store = tools.store
        self._artifacts = tools.artifacts
        self._estimator = tools.estimator
        self._limits = limits
        self._feeds = JobFeeds(self._store.clock.now)
        claim_limits = ClaimLimits(
            limits.max_running_jobs, limits.max_running_jobs_per_caller, model.identity.fingerprint
        )
        self._positions = QueuePositions(self._store, self._feeds, self._estimator, claim_limits)
        self._membership = Membership(self._store, model, policy.lease_seconds, self._lose_all)
        self.readiness = Readiness(
            self._store,
            self._artifacts,
            lambda: self._membership.replica_id,
            policy.max_outage_seconds,
            observe_readiness,
        )
        self.executor = JobExecutor(
            engine,
            self._feeds,
            tools,
            claim_limits,
            lambda: self._membership.replica_id,
            lambda: self.readiness.may_claim,
            self._on_held,
            self._on_lost,
            capacity,
        )
        self._closed = asyncio.Event()
        max_lost_calls = limits.max_streams_per_caller or limits.max_streams
        self._callers = AttachedCallers(
            self._store, self._feeds, max_lost_calls, self._closed, self._on_cancelled
        )
        self._follower = StoreFollower(self._store, self._feeds, self.executor)
        self._orphans = OrphanedFiles(self._store, self._artifacts)
        retention = Retention(
            policy.retention, self._store, self._artifacts, self._feeds.has_readers, observe_retention
        )
        self._housekeeping = Housekeeping(self._store, retention, self._orphans, policy.orphan_sweep_seconds)
        self._counts = JobCounts(self._store)
        self._changed_jobs = ChangedJobs(self._store)
        self._observe_late_refusal = observe_late_refusal
        self._intake = JobIntake(self._store, limits, self._wait_for_end)
        self._changed = asyncio.Event()
        self._calls = RunningCalls()

    # --- what the server asks ---------------------------------------------------------------------

    @property
    def num_queued(self) -> int:
        """Number of jobs that wait, as last counted."""
        return self._counts[JobState.QUEUED]

    @property
    def num_running(self) -> int:
        """Number of jobs that run, as last counted."""
        return self._counts[JobState.RUNNING]

    @property
    def queue(self) -> QueueDurations:
        """How long the jobs wait that wait for this server's model, as last read."""
        return self._positions.durations

    @property
    def num_accepted(self) -> int:
        """Number of jobs accepted by this server since its start."""
        return self._intake.num_accepted

    def num_ended(self, state: JobState) -> int:
        """Number of jobs that this server ended in a state since its start."""
        return self._store.num_ended(state)

    def set_engine_state(self, state: EngineState) -> None:
        """Note whether the rank group can work."""
        self.readiness.set_engine_state(state)
        self.executor.notify()

    @property
    def retry_after_seconds(self) -> float:
        """Seconds until a place in the queue is likely to be free."""
        return max(MIN_RETRY_SECONDS, self._estimator.next_start_seconds or 0.0)

    @property
    def waiting_sizes(self) -> Collection[SampleSize]:
        """Sizes of which a step would hold more jobs if it had room: the engine asks."""
        return self.executor.waiting_sizes

    def take(self) -> EngineRequest | None:
        """Remove and return the request that is next, or None when none waits: the engine asks."""
        return self.executor.take()

    async def join(self) -> None:
        """Register with the store, before anything is accepted; raises StoreUnavailableError."""
        await self._membership.join()

    async def run(self) -> None:
        """Run jobs, follow the store, and clean up, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            if self._store.is_shared:
                tasks.create_task(
                    keep_doing("show that this server lives", self._membership.beat, self._membership.pause)
                )
            for work in (
                self._follower,
                self.executor,
                self._positions,
                self._housekeeping,
                self._counts,
                self._changed_jobs,
                self.readiness.store_probe,
                self.readiness.artifact_probe,
            ):
                tasks.create_task(work.run())

    @property
    def live_models(self) -> tuple[LiveModel, ...]:
        """Models that live servers of the store serve, this one's first, as of the last heartbeat."""
        return self._membership.live_models

    async def model(self, name: str | None) -> LiveModel:
        """The model of a name; None is for this server's own.

        Raises:
            ModelNotServedError: no live server serves it.
            StoreUnavailableError: it cannot be found out which do.
        """
        return await self._membership.model(name)

    async def refresh_counts(self) -> None:
        """Count the jobs anew; while the store does not answer, the old numbers stay."""
        await self._counts.refresh()

    async def drain(self, grace_seconds: float) -> None:
        """Accept nothing more, let the jobs that run here end and be read, and give back the rest.

        What waits is left to other replicas, or to the next start.
        """
        self.readiness.is_draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._until(lambda: self.executor.num_held == 0)
                self._close()
                await self._until(lambda: self._feeds.num_readers == 0)
        except TimeoutError:
            pass
        await self.executor.release_all()
        self._close()
        await self._calls.wait(CLOSE_SECONDS)
        with contextlib.suppress(HiDreamError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._membership.leave()

    # --- what callers ask -------------------------------------------------------------------------

    async def submit(
        self,
        submission: Submission,
        owner: str = "",
        call_id: str = "",
        refusal: RequestError | None = None,
    ) -> Job:
        """Accept a request, or follow up on the one of this owner that has its request id."""
        (job,) = await self.submit_all([submission], owner, call_id, refusal)
        return job

    @contextlib.asynccontextmanager
    async def attended(
        self,
        submission: Submission,
        owner: str,
        refusal: RequestError | None,
        leaving_reason: Callable[[], CancelReason],
        reconnect_window_seconds: float = 0.0,
    ) -> AsyncIterator[Job]:
        """Submit a job whose caller stays with it: when its last caller leaves, the job stops.

        A caller leaves when the block is cancelled or closed before the job has ended. A job whose submission
        is detached goes on then, and so does one whose stream broke: its caller tries again.

        Args:
            leaving_reason: called when the caller leaves, for why it does.
            reconnect_window_seconds: how long a caller that left still counts: its connection may be lost.

        Raises:
            HiDreamError: what `submit_all` raises.
        """
        call_id = "" if submission.is_detached else uuid.uuid4().hex
        job = await self.submit(submission, owner, call_id, refusal)
        reason = None
        with self._feeds.used(job.job_id, is_reader=False) as feed:
            try:
                yield job
            except (asyncio.CancelledError, GeneratorExit):
                reason = leaving_reason()
                raise
            finally:
                if call_id and not feed.has_ended:
                    if reason is CancelReason.CALLER_LEFT and reconnect_window_seconds > 0:
                        call = AttachedCall(call_id, self._membership.replica_id)
                        self._callers.detach_later(job, call, reason, reconnect_window_seconds)
                    else:
                        self.detach(job.job_id, call_id, reason)

    async def submit_all(
        self,
        submissions: Sequence[Submission],
        owner: str,
        call_id: str = "",
        refusal: RequestError | None = None,
    ) -> tuple[Job, ...]:
        """Accept all requests or none; what is returned survives every process.

        A caller that is cancelled meanwhile leaves what is accepted then, as `detach` says.

        Args:
            call_id: of a caller that stays with the job until it calls `detach`; empty for one that does not.
            refusal: why the requests cannot become new jobs; they can still find those that they became.

        Raises:
            NotServingError: the engine is starting, has failed, or the service drains.
            QueueFullError, CallerQueueFullError: too many jobs wait.
            CallerQuotaError: the caller has asked for too much within a minute.
            RequestIdConflictError: a request id was used with another request.
            RequestError: the refusal, where not all requests have their jobs.
            TooBusyForDeadlineError, DeadlineTooShortError: a request cannot end before its deadline.
            StoreUnavailableError, StoreFullError: the store is lost or full.
            ArtifactUnavailableError: images could not be stored.
        """
        self.readiness.check()
        call = AttachedCall(call_id, self._membership.replica_id) if call_id else None
        refusal = refusal or self.readiness.refusal or self._deadline_refusal(submissions)
        accepting = self._intake.accept(submissions, owner, self.retry_after_seconds, call, refusal)
        try:
            accepted = await self._calls.finish(accepting, if_left=partial(self._detach_early, call_id))
        except (TooBusyForDeadlineError, DeadlineTooShortError):
            self._observe_late_refusal()
            raise
        except StoreUnavailableError:
            if call is not None:
                self._callers.forget(call)
            raise
        for submission in submissions:
            if submission.deadline_seconds is not None and not submission.is_detached:
                self._housekeeping.expect_late_job(submission.deadline_seconds)
        return accepted

    async def get(self, owner: str | None, job_id: str) -> Job:
        """A job as it is now; raises JobNotFoundError."""
        return self._newest(await self._store.get(owner, job_id))

    async def list(
        self,
        owner: str | None,
        states: Collection[JobState],
        labels: Mapping[str, str],
        page_size: int,
        page_token: str,
    ) -> Page:
        """A page of jobs, newest first; raises InvalidRequestError for a token that is none of ours."""
        page = await self._store.list(owner, states, labels, page_size, page_token)
        return replace(page, jobs=tuple(map(self._newest, page.jobs)))

    async def queue_positions(self, jobs: Sequence[Job]) -> Sequence[Queued | None]:
        """Position and estimated wait of each of the jobs; None for one that does not wait."""
        waiting = [job.job_id for job in jobs if job.state is JobState.QUEUED]
        positions = dict(zip(waiting, await self._positions.of(waiting), strict=True))
        return [positions.get(job.job_id) for job in jobs]

    async def follow(
        self, owner: str | None, job_id: str, after_sequence: int = 0
    ) -> AsyncGenerator[JobEvent]:
        """The job's events after a sequence, to its end.

        Raises:
            JobNotFoundError: no such job, it is another's, or it was deleted.
            NotServingError: the service went away before the job ended.
        """
        with self._feeds.used(job_id, is_reader=True) as feed:
            try:
                job = await self._store.get(owner, job_id)
                if self.executor.job(job_id) is None:
                    feed.sync(job)
                    if job.state is JobState.QUEUED:
                        # A reader who comes back has seen positions that were published by another process.
                        highest = claim_sequence(job.claim_number, MAX_RESUMED_COUNTER)
                        feed.continue_after(min(after_sequence, highest))
                        await self._positions.publish_to(job_id, feed)
                async for event in feed.follow(after_sequence):
                    yield event
            finally:
                self._note_reader_left()

    def follow_all(
        self, owner: str | None, states: Collection[JobState], labels: Mapping[str, str]
    ) -> AsyncGenerator[JobChange]:
        """The jobs that match, then every change of their states, until the generator is closed.

        Readers of the same change get the same object.

        Raises:
            NotServingError: the service goes away.
            StoreUnavailableError: the store is lost.
        """
        return StateChanges(self._store, self._changed_jobs, owner, states, labels).follow()

    async def cancel(self, owner: str | None, job_id: str, reason: CancelReason) -> Job:
        """Stop a job: a running one takes no further step. Nothing happens to one that has ended."""
        job = await self._store.request_cancel(owner, job_id, reason)
        self._on_cancelled(job)
        return job

    def detach(self, job_id: str, call_id: str, reason: CancelReason | None) -> None:
        """Note that a caller of `submit` goes; with a reason the job stops if it was the last one."""
        call = AttachedCall(call_id, self._membership.replica_id)
        self._callers.detach(job_id, call, reason)

    async def delete(self, owner: str | None, job_id: str) -> None:
        """Remove a job that has ended, and its images; raises JobNotFoundError or JobNotEndedError."""
        await remove_job(self._store, self._artifacts, owner, job_id)

    @contextlib.contextmanager
    def reading(self, job_id: str) -> Iterator[None]:
        """Keep a job's images from being removed as too old, and the service from going away."""
        with self._feeds.used(job_id, is_reader=True):
            try:
                yield
            finally:
                self._note_reader_left()

    def image_reader(self, job_id: str) -> ImageReader:
        """A reader of the finished images of a job for one stream, which checks them."""
        return ImageReader(job_id, self._store, self._artifacts)

    # --- the rest ---------------------------------------------------------------------------------

    def _deadline_refusal(self, submissions: Sequence[Submission]) -> RequestError | None:
        """Why a request cannot end in time; None where another server may run it, which may be faster."""
        if self._membership.shares_queue:
            return None
        own = self._membership.own_model.identity.fingerprint
        judged = [s for s in submissions if s.model is None or s.model.fingerprint == own]
        return deadline_refusal(judged, self._estimator)

    def _detach_early(self, call_id: str, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if call_id and not job.submission.is_detached:
                self.detach(job.job_id, call_id, CancelReason.CALLER_LEFT)

    async def _wait_for_end(self, job_id: str) -> None:
        async with contextlib.aclosing(self.follow(None, job_id)) as events:
            async for _ in events:
                pass

    def _lose_all(self) -> None:
        self.executor.lose_all()

    async def _on_lost(self, job: Job) -> None:
        try:
            await self._orphans.remove_lost(job)
        except HiDreamError as error:
            logger.info("images of a lost claim stay until the next sweep: %s", error)

    def _on_cancelled(self, job: Job) -> None:
        if job.state.has_ended:
            self._housekeeping.note_end()
        else:
            self.executor.cancel(job.job_id, job.cancel_reason or CancelReason.CALLER_LEFT)

    def _on_held(self, job: Job) -> None:
        if job.state.has_ended:
            self._housekeeping.note_end()
        elif self.executor.job(job.job_id) is None:
            # From now on its row holds what becomes of it.
            self._follower.outdate(job.job_id)
        self._changed.set()

    def _newest(self, job: Job) -> Job:
        """The newer of a job's row and of the same claim as it is known here."""
        held = self.executor.job(job.job_id)
        return job if held is None or held.claim_number != job.claim_number else held

    def _note_reader_left(self) -> None:
        self._changed.set()
        # What it read may be too old by now.
        self._housekeeping.note_end()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _close(self) -> None:
        self._closed.set()
        self._feeds.close(shutting_down())
        self._changed_jobs.close(shutting_down())
