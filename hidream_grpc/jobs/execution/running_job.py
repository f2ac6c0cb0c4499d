"""One claim of a job: what the engine tells of it is made durable, and then told to readers.

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

from hidream_grpc.background import RETRY_SECONDS, Outage
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
    SnapshotError,
    StorageFullError,
)
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.execution.claim_state import ClaimState, StopReason, Storing
from hidream_grpc.jobs.execution.snapshot_keeper import SnapshotKeeper
from hidream_grpc.jobs.job import CancelReason, Execution, Job, JobState, Progress, StoredSnapshot
from hidream_grpc.jobs.retrying import TRANSIENT_ERRORS, wait_at_most
from hidream_grpc.jobs.store.claims import Saved
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobEvent, JobFeed, Previewed, Progressed, Restarted
from hidream_grpc.model.snapshot_format import SnapshotIdentity, unpack

logger = logging.getLogger(__name__)

LOST_SERVER = "the server that drew it ended"
GIVE_BACK_SECONDS = 1.5
"""How long the store is tried for a job that is given back; then other replicas take it as lost."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class JobTools:
    """What every running job needs.

    Attributes:
        chunk_bytes: of the parts in which images are told.
        publish_to_replicas: hears of what no row tells, for the readers of other replicas.
        checkpoint_fingerprint: a snapshot of another checkpoint is refused.
    """

    store: SqlJobStore
    artifacts: ArtifactStore
    estimator: JobEstimator
    describe_execution: Callable[[], Execution]
    chunk_bytes: int
    publish_to_replicas: Callable[[str, JobEvent], None]
    checkpoint_fingerprint: str


@dataclass(frozen=True, slots=True)
class _Happened:
    """What the engine told, and when, on the clock of time.monotonic."""

    event: EngineEvent | None
    time: float


class _StopChangedError(Exception):
    """What was to be written is out of date: the claim is stopped, or for a stronger reason."""


class RunningJob:
    """One claim of one job, from when it was claimed until its end is written, or never will be.

    `cancel`, `give_back` and `lose` may be called in any state and any order, also twice.
    """

    def __init__(self, job: Job, feed: JobFeed, tools: JobTools) -> None:
        self.job = job
        self._feed = feed
        self._tools = tools
        self._state = ClaimState()
        self._state_changed = asyncio.Event()
        self._happened: asyncio.Queue[_Happened] = asyncio.Queue()
        self._failure: JobInternalError | None = None
        self._first_attempt = 0 if job.execution is None else job.execution.attempt
        self._snapshots = SnapshotKeeper(job.job_id, job.claim_number, tools.artifacts, self._name_snapshot)
        # One writes the row at a time, each the job as it is then.
        self._writing = asyncio.Lock()
        self._denoise_start: float | None = None
        self._kept_denoise_seconds = job.timings.denoise_seconds if job.snapshot is not None else 0.0
        feed.sync(job)

    @property
    def claim_id(self) -> str:
        """What the engine knows the job of this claim by."""
        return f"{self.job.job_id}/{self.job.claim_number}"

    @property
    def is_running(self) -> bool:
        """Whether the engine is to go on with it."""
        return self._state.is_running

    def cancel(self, reason: CancelReason) -> None:
        """Have the job end as CANCELLED, unless the claim is lost or has ended."""
        self._change(self._state.cancelled(reason))

    def give_back(self) -> None:
        """Have the job wait again, for any replica, unless it is cancelled or the claim has ended."""
        self._change(self._state.given_back())

    def lose(self) -> None:
        """Note that another replica has the job by now: nothing more of it is written or told here."""
        self._change(self._state.lost())

    def tell(self, event: EngineEvent) -> None:
        """Take an event from the engine; in any state, without an effect once the claim is stopped."""
        self._tools.estimator.observe(self.job.job_id, event)
        if isinstance(event, SnapshotTaken):
            self._snapshots.take(event)
        else:
            self._note(event)

    async def engine_request(self) -> EngineRequest | None:
        """What the engine is to do; None when that is nothing. Call it once, before `run`."""
        job = self.job
        try:
            snapshot = await self._read_snapshot()
        except _StopChangedError:
            return None
        finished_images = frozenset(image.index for image in job.images)
        if len(finished_images) == job.submission.parameters.num_images:
            # Only its end was not written any more.
            self.tell(RequestFinished())
            return None
        return EngineRequest(
            claim_id=self.claim_id,
            job_id=job.job_id,
            request_id=job.submission.request_id,
            parameters=job.submission.parameters,
            on_event=self.tell,
            snapshot=snapshot,
            finished_images=finished_images,
        )

    async def run(self) -> None:
        """Work off what the engine tells, to the end of the claim. Call it once.

        Raises:
            ClaimLostError: another replica has the job.
            StoreUnavailableError, StoreFullError: the job could not be given back.
        """
        snapshots = asyncio.create_task(self._snapshots.run())
        try:
            await self._work_off()
            await self._write_end()
        finally:
            self._state = self._state.ended()
            snapshots.cancel()
        if self.job.state.has_ended:
            await self._remove_snapshots()

    # --- the claim --------------------------------------------------------------------------------

    def _change(self, state: ClaimState) -> None:
        if state != self._state:
            self._state = state
            self._state_changed.set()
            self._note(None)

    def _note(self, event: EngineEvent | None) -> None:
        self._happened.put_nowait(_Happened(event, time.monotonic()))

    async def _work_off(self) -> None:
        try:
            while self._state.is_running and not self.job.state.has_ended:
                happened = await self._happened.get()
                if happened.event is not None and self._state.is_running:
                    await self._apply(happened.event, happened.time)
        except _StopChangedError:
            pass
        except ClaimLostError:
            self.lose()
        except Exception:
            # Whatever it is: a job must end.
            self._failure = JobInternalError.new()
            facts = {"job_id": self.job.job_id, "error_id": self._failure.error_id}
            logger.exception("job failed", extra=facts)

    async def _write_end(self) -> None:
        """Write how the claim ends; a stronger reason that comes meanwhile begins it anew."""
        while not self.job.state.has_ended:
            try:
                match self._state.stop_reason:
                    case StopReason.LOST:
                        raise ClaimLostError(self.job.job_id, self.job.claim_number)
                    case StopReason.CANCEL:
                        await self._end_cancelled(self._state.cancel_reason or CancelReason.REQUESTED)
                    case StopReason.GIVE_BACK:
                        await self._release()
                        return
                    case None:
                        await self._end(JobState.FAILED, self._failure or JobInternalError.new())
            except _StopChangedError:
                continue

    async def _retry_until_stored(self, action: Callable[[], Awaitable[Result]]) -> Result:
        """Do it again and again until the stores heal, as long as the state of the claim asks for it.

        Raises:
            _StopChangedError: the state of the claim has changed.
            HiDreamError: what the last try raised, where the claim does not wait for the stores.
        """
        state = self._state
        give_up_time = time.monotonic() + GIVE_BACK_SECONDS
        outage = Outage(logger, f"keep what was drawn of job {self.job.job_id}")
        while True:
            try:
                result = await action()
                outage.note_success()
                return result
            except TRANSIENT_ERRORS as error:
                outage.note_failure(error)
                if state.storing is Storing.FOR_A_WHILE and time.monotonic() > give_up_time:
                    raise
            self._state_changed.clear()
            if self._state == state:
                await wait_at_most(self._state_changed, RETRY_SECONDS)
            if self._state != state:
                raise _StopChangedError

    # --- what the engine tells --------------------------------------------------------------------

    async def _apply(self, event: EngineEvent, when: float) -> None:
        match event:
            case RequestStarted():
                await self._start(when)
            case PromptsEncoded(encode_seconds):
                self.job = self.job.encoded(encode_seconds)
            case StepFinished(step, step_seconds):
                self._step_finished(step, step_seconds, when)
            case PreviewMade(step, data):
                self._feed.publish(Previewed(step, data))
            case RequestRestarted():
                self._restart(event)
            case ImageFinished():
                await self._add_image(event)
            case RequestFinished():
                await self._end(JobState.SUCCEEDED)
            case RequestFailed(error):
                await self._end(JobState.FAILED, error)

    async def _read_snapshot(self) -> bytes | None:
        kept = self.job.snapshot
        if kept is None:
            return None
        job_id, claim_number = self.job.job_id, kept.claim_number
        data = await self._retry_until_stored(
            lambda: self._tools.artifacts.read_snapshot(job_id, claim_number)
        )
        self.job = replace(self.job, snapshot=None)
        if data is None:
            return None
        identity = SnapshotIdentity(self.job.submission.parameters, self._tools.checkpoint_fingerprint)
        try:
            step = unpack(data, identity).step
        except SnapshotError as error:
            logger.warning("job starts from its seed: %s", error, extra={"job_id": job_id})
            return None
        # Later than the row's where a kill came between.
        self.job = replace(self.job, snapshot=StoredSnapshot(claim_number, step))
        return data

    async def _start(self, when: float) -> None:
        execution = replace(self._tools.describe_execution(), attempt=self._first_attempt + 1)
        if self.job.state is JobState.RUNNING:
            await self._go_on(execution)
            return
        sequence = self._feed.reserve_sequence()
        start_time = self._tools.store.clock.now() - (time.monotonic() - when)
        started = self.job.started(execution, start_time)
        await self._save(replace(started, started_sequence=sequence, last_sequence=sequence))

    async def _go_on(self, execution: Execution) -> None:
        """The replica that drew it is gone."""
        step = 0 if self.job.snapshot is None else self.job.snapshot.step
        await self._save(replace(self.job.restarted(execution.attempt, step), execution=execution))
        self._tell(Restarted(execution.attempt, LOST_SERVER, step))

    def _step_finished(self, step: int, step_seconds: float, when: float) -> None:
        if self._denoise_start is None:
            # An attempt's first step is told when it has ended.
            self._denoise_start = when - step_seconds
        job = self.job
        remaining_seconds = self._tools.estimator.remaining_seconds(job.job_id)
        total_steps = job.submission.parameters.num_inference_steps
        progress = Progress(step, total_steps, step_seconds, remaining_seconds)
        denoise_seconds = self._kept_denoise_seconds + when - self._denoise_start
        self.job = job.progressed(progress, denoise_seconds)
        self._tell(Progressed(progress))

    def _restart(self, event: RequestRestarted) -> None:
        self._denoise_start = None
        self._kept_denoise_seconds = self.job.timings.denoise_seconds if event.resumed_from_step else 0.0
        attempt = self._first_attempt + event.attempt
        self.job = self.job.restarted(attempt, event.resumed_from_step)
        self._tell(Restarted(attempt, event.reason, event.resumed_from_step))

    def _tell(self, body: Progressed | Restarted) -> None:
        self._tools.publish_to_replicas(self.job.job_id, self._feed.publish(body))

    async def _add_image(self, event: ImageFinished) -> None:
        job = self.job
        parameters = job.submission.parameters
        try:
            image = await self._retry_until_stored(
                lambda: self._tools.artifacts.write(
                    job.job_id, job.claim_number, event.image_index, parameters, event.data
                )
            )
        except StorageFullError as error:
            await self._end(JobState.FAILED, error)
            return
        image = replace(
            image,
            first_sequence=self._feed.reserve_sequence(),
            time=self._tools.store.clock.now(),
            chunk_bytes=self._tools.chunk_bytes,
        )
        drawn = job.with_image(image, event.decode_seconds)
        await self._save(replace(drawn, last_sequence=image.last_sequence))

    # --- what is written --------------------------------------------------------------------------

    async def _end_cancelled(self, reason: CancelReason) -> None:
        job_id = self.job.job_id
        is_late = reason is CancelReason.DEADLINE
        self.job = replace(self.job, cancel_reason=reason)
        await self._end(
            JobState.CANCELLED, DeadlineExceededError(job_id) if is_late else JobCancelledError(job_id)
        )

    async def _end(self, state: JobState, error: HiDreamError | None = None) -> None:
        ended = self.job.ended(state, self._tools.store.clock.now(), error)
        await self._save(replace(ended, last_sequence=self._feed.reserve_sequence()))

    async def _save(self, job: Job) -> None:
        """Commit the job as it is now, and tell what is new."""

        async def write() -> Job:
            async with self._writing:
                written = replace(job, snapshot=self.job.snapshot)
                if await self._tools.store.save(written) is Saved.IS_TO_BE_CANCELLED:
                    newest = await self._tools.store.get(None, job.job_id)
                    self.cancel(newest.cancel_reason or CancelReason.REQUESTED)
                    raise _StopChangedError
                # A snapshot may have been stored meanwhile.
                self.job = replace(written, snapshot=self.job.snapshot)
                return written

        try:
            written = await self._retry_until_stored(write)
        except ClaimLostError:
            self.lose()
            raise _StopChangedError from None
        self._feed.sync(written)

    async def _name_snapshot(self, step: int) -> None:
        """Have the row name a snapshot that is stored, once: the next one makes up for it."""
        self.job = replace(self.job, snapshot=StoredSnapshot(self.job.claim_number, step))
        async with self._writing:
            if not self._state.is_running or self.job.state.has_ended:
                return
            try:
                await self._tools.store.save(self.job)
            except ClaimLostError:
                self.lose()

    async def _release(self) -> None:
        await self._snapshots.store()
        try:
            released = await self._retry_until_stored(lambda: self._tools.store.release(self.job))
        except ClaimLostError:
            self.lose()
            raise _StopChangedError from None
        self._feed.sync(released)

    async def _remove_snapshots(self) -> None:
        try:
            await self._tools.artifacts.remove_snapshots(self.job.job_id)
        except ArtifactUnavailableError as error:
            logger.warning("a snapshot stays until files without a job are removed: %s", error)
