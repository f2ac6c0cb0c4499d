"""A job that this server draws: what the engine tells of it is made durable, and then told to readers.

In this order: the artifact is written, the row is committed, the event is published. While the store or
the artifact store is lost, the engine goes on, and what it told waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from hidream_grpc.engine.requests import (
    EngineEvent,
    EngineRequest,
    ImageFinished,
    PreviewMade,
    PromptsEncoded,
    RequestFailed,
    RequestFinished,
    RequestRestarted,
    RequestStarted,
    SnapshotTaken,
    StepFinished,
)
from hidream_grpc.errors import (
    ArtifactUnavailableError,
    ClaimLostError,
    DeadlineExceededError,
    HiDreamError,
    JobCancelledError,
    JobInternalError,
    StorageFullError,
    StoreFullError,
    StoreUnavailableError,
)
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.events import JobEvent, JobFeed, Previewed, Progressed, Restarted
from hidream_grpc.jobs.job import CancelReason, Execution, Job, JobState, Progress
from hidream_grpc.jobs.outages import Outage
from hidream_grpc.jobs.outlook import Outlook
from hidream_grpc.jobs.pauses import wait_at_most
from hidream_grpc.jobs.snapshots import SnapshotKeeper, step_of
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

LOST_SERVER = "the server that drew it ended"
HEAL_SECONDS = 0.5
TRANSIENT_ERRORS = (StoreUnavailableError, StoreFullError, ArtifactUnavailableError)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class JobTools:
    """What every running job needs.

    Attributes:
        chunk_bytes: of the parts in which images are told.
        tell_others: hears of what no row tells, for the readers of other replicas.
    """

    store: SqlJobStore
    artifacts: ArtifactStore
    outlook: Outlook
    describe_execution: Callable[[], Execution]
    chunk_bytes: int
    tell_others: Callable[[str, JobEvent], None]


class _StoppedError(Exception):
    """The job is to be cancelled, given back, or is lost."""


class RunningJob:
    """One claim of one job, from when it was claimed until it ends, is given back, or is lost."""

    def __init__(self, job: Job, feed: JobFeed, tools: JobTools) -> None:
        self.job = job
        self._feed = feed
        self._tools = tools
        self._events: asyncio.Queue[EngineEvent | None] = asyncio.Queue()
        self._stopped = asyncio.Event()
        self._cancel_reason: CancelReason | None = None
        self._is_lost = False
        self._first_attempt = 0 if job.execution is None else job.execution.attempt
        self._snapshots = SnapshotKeeper(job.job_id, tools.store, tools.artifacts)
        self._denoise_start: float | None = None
        self._kept_denoise_seconds = job.timings.denoise_seconds if job.snapshot_step else 0.0
        feed.sync(job)

    @property
    def is_stopped(self) -> bool:
        """Whether the engine needs to do nothing more for it."""
        return self._stopped.is_set() or self.job.state.has_ended

    def cancel(self, reason: CancelReason) -> None:
        """Have it end as cancelled, unless it is stopped already."""
        if not self._stopped.is_set():
            self._cancel_reason = reason
            self._stop()

    def give_back(self) -> None:
        """Have it wait again, for anybody."""
        self._stop()

    def lose(self) -> None:
        """Somebody else has it by now."""
        self._is_lost = True
        self._stop()

    def tell(self, event: EngineEvent) -> None:
        """Take an event from the engine."""
        self._tools.outlook.observe(self.job.job_id, event)
        if isinstance(event, SnapshotTaken):
            # Of those that wait for a lost store only the newest is of use.
            self._snapshots.take(event)
            event = replace(event, data=b"")
        self._events.put_nowait(event)

    async def engine_request(self) -> EngineRequest | None:
        """What the engine is to do; None when that is nothing."""
        job = self.job
        snapshot = None
        try:
            if job.snapshot_step is not None and self._is_of_this_model():
                snapshot = await self._lasting(lambda: self._tools.artifacts.read_snapshot(job.job_id))
        except _StoppedError:
            return None
        self.job = replace(job, snapshot_step=step_of(snapshot))
        finished_images = frozenset(image.index for image in job.images)
        if len(finished_images) == job.submission.parameters.num_images:
            # Only its end was not written any more.
            self.tell(RequestFinished())
            return None
        return EngineRequest(
            job_id=job.job_id,
            request_id=job.submission.request_id,
            parameters=job.submission.parameters,
            on_event=self.tell,
            snapshot=snapshot,
            finished_images=finished_images,
        )

    async def run(self) -> None:
        """Work off what the engine tells, to the end of the claim.

        Raises:
            ClaimLostError: somebody else has the job.
        """
        try:
            while not self.is_stopped:
                if (event := await self._events.get()) is not None and not self.is_stopped:
                    await self._apply(event)
        except _StoppedError:
            pass
        if self.job.state.has_ended:
            await self._snapshots.remove(self.job)
        elif self._is_lost:
            raise ClaimLostError(self.job.job_id, self.job.claim_number)
        elif self._cancel_reason is not None:
            await self._end_cancelled(self._cancel_reason)
        else:
            await self._release()

    def _is_of_this_model(self) -> bool:
        """Whether what was drawn so far can be gone on with; the operator may have changed the model."""
        now, before = self._tools.describe_execution(), self.job.execution
        return before is not None and (now.model, now.scheduler, now.shift) == (
            before.model,
            before.scheduler,
            before.shift,
        )

    def _stop(self) -> None:
        self._stopped.set()
        self._events.put_nowait(None)

    async def _apply(self, event: EngineEvent) -> None:
        match event:
            case RequestStarted():
                await self._start()
            case PromptsEncoded(encode_seconds):
                self.job = self.job.encoded(encode_seconds)
            case StepFinished(step, step_seconds):
                self._step_finished(step, step_seconds)
            case PreviewMade(step, data):
                self._feed.publish(Previewed(step, data))
            case SnapshotTaken():
                if self._snapshots.is_due:
                    self.job = await self._snapshots.keep(self.job)
            case RequestRestarted():
                self._restart(event)
            case ImageFinished():
                await self._add_image(event)
            case RequestFinished():
                await self._end(JobState.SUCCEEDED)
            case RequestFailed(error):
                await self._end(JobState.FAILED, error)

    async def _start(self) -> None:
        execution = replace(self._tools.describe_execution(), attempt=self._first_attempt + 1)
        if self.job.state is JobState.RUNNING:
            await self._go_on(execution)
            return
        sequence = self._feed.reserve_sequence()
        started = self.job.started(execution, time.time())
        await self._save(replace(started, started_sequence=sequence, last_sequence=sequence))

    async def _go_on(self, execution: Execution) -> None:
        """Whoever drew it is gone."""
        step = self.job.snapshot_step or 0
        await self._save(replace(self.job.restarted(execution.attempt, step), execution=execution))
        self._tell(Restarted(execution.attempt, LOST_SERVER, step))

    def _step_finished(self, step: int, step_seconds: float) -> None:
        now = time.monotonic()
        if self._denoise_start is None:
            # An attempt's first step is told when it has ended.
            self._denoise_start = now - step_seconds
        job = self.job
        remaining_seconds = self._tools.outlook.remaining_seconds(job.job_id)
        total_steps = job.submission.parameters.num_inference_steps
        progress = Progress(step, total_steps, step_seconds, remaining_seconds)
        denoise_seconds = self._kept_denoise_seconds + now - self._denoise_start
        self.job = job.progressed(progress, denoise_seconds)
        self._tell(Progressed(progress))

    def _restart(self, event: RequestRestarted) -> None:
        self._denoise_start = None
        self._kept_denoise_seconds = self.job.timings.denoise_seconds if event.resumed_from_step else 0.0
        attempt = self._first_attempt + event.attempt
        self.job = self.job.restarted(attempt, event.resumed_from_step)
        self._tell(Restarted(attempt, event.reason, event.resumed_from_step))

    def _tell(self, body: Progressed | Restarted) -> None:
        self._tools.tell_others(self.job.job_id, self._feed.publish(body))

    async def _add_image(self, event: ImageFinished) -> None:
        job = self.job
        parameters = job.submission.parameters
        try:
            image = await self._lasting(
                lambda: self._tools.artifacts.write(job.job_id, event.image_index, parameters, event.data)
            )
        except StorageFullError as error:
            await self._end(JobState.FAILED, error)
            return
        image = replace(
            image,
            first_sequence=self._feed.reserve_sequence(),
            time=time.time(),
            chunk_bytes=self._tools.chunk_bytes,
        )
        drawn = job.with_image(image, event.decode_seconds)
        await self._save(replace(drawn, last_sequence=image.last_sequence))

    async def _end_cancelled(self, reason: CancelReason) -> None:
        job_id = self.job.job_id
        is_late = reason is CancelReason.DEADLINE
        self.job = replace(self.job, cancel_reason=reason)
        self._stopped.clear()
        await self._end(
            JobState.CANCELLED, DeadlineExceededError(job_id) if is_late else JobCancelledError(job_id)
        )
        await self._snapshots.remove(self.job)

    async def _end(self, state: JobState, error: HiDreamError | None = None) -> None:
        ended = self.job.ended(state, time.time(), error)
        await self._save(replace(ended, last_sequence=self._feed.reserve_sequence()))

    async def _save(self, job: Job) -> None:
        """Commit the job as it is now, and tell what is new."""
        await self._lasting(lambda: self._tools.store.save(job))
        self.job = job
        self._feed.sync(job)

    async def _release(self) -> None:
        self.job = await self._snapshots.keep(self.job)
        self._feed.sync(await self._tools.store.release(self.job))

    async def _lasting(self, action: Callable[[], Awaitable[Result]]) -> Result:
        """Do it, again and again until the stores heal; raises _StoppedError when the job is stopped."""
        outage = Outage(logger, f"keep what was drawn of job {self.job.job_id}")
        while True:
            try:
                result = await action()
                outage.note_success()
                return result
            except TRANSIENT_ERRORS as error:
                outage.note_failure(error)
                if await wait_at_most(self._stopped, HEAL_SECONDS):
                    raise _StoppedError from error

    async def fail(self) -> JobInternalError:
        """End it after an error that nobody foresaw; returns what its readers are told."""
        error = JobInternalError.new()
        self._stopped.clear()
        await self._end(JobState.FAILED, error)
        return error
