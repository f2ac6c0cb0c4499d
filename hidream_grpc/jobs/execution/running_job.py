"""One claim of a job: the engine's events become changes of the job, each durable before it is published.

While the store or the artifact store is lost the engine goes on, and its events wait here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

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
from hidream_grpc.errors import ClaimLostError, JobInternalError
from hidream_grpc.jobs.execution.claim_state import ClaimState, StopReason
from hidream_grpc.jobs.execution.claim_writer import ClaimWriter, StopChangedError
from hidream_grpc.jobs.execution.job_spans import StageSpans
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.execution.snapshot_keeper import SnapshotKeeper
from hidream_grpc.jobs.job import CancelReason, Execution, Job, JobState, Progress
from hidream_grpc.jobs.store.step_room import StepDemand
from hidream_grpc.jobs.watching.events import JobFeed, Previewed, Progressed, Restarted

logger = logging.getLogger(__name__)

LOST_SERVER = "the server that ran it ended"
LOST_CLAIM = "another server has the job, or it was removed"


@dataclass(frozen=True, slots=True)
class _Happened:
    """An event of the engine, or None for a change of the claim; time is that of time.monotonic."""

    event: EngineEvent | None
    time: float


class RunningJob:
    """One claim of one job, from when it was claimed until its end is written, or never will be.

    `cancel`, `give_back` and `lose` may be called in any state and any order, also twice.
    """

    def __init__(self, job: Job, feed: JobFeed, tools: JobTools) -> None:
        self._feed = feed
        self._tools = tools
        self._happened: asyncio.Queue[_Happened] = asyncio.Queue()
        self._claim = ClaimWriter(job, feed, tools, on_change=self._note_change)
        self._snapshots = SnapshotKeeper(
            job.job_id, job.claim_number, tools.artifacts, self._claim.name_snapshot
        )
        self._spans = StageSpans(job, tools.record_span)
        self._failure: JobInternalError | None = None
        self._first_attempt = 0 if job.execution is None else job.execution.attempt
        self._step = 0 if job.snapshot is None else job.snapshot.step
        self._denoise_start: float | None = None
        self._kept_denoise_seconds = job.timings.denoise_seconds if job.snapshot is not None else 0.0
        feed.sync(job)

    @property
    def job(self) -> Job:
        """The job as it is now."""
        return self._claim.job

    @property
    def claim_id(self) -> str:
        """The id by which the engine knows this claim."""
        return f"{self.job.job_id}/{self.job.claim_number}"

    @property
    def is_running(self) -> bool:
        """Whether the engine is to go on with the job."""
        return self._state.is_running

    @property
    def demand(self) -> StepDemand:
        """What it asks of the engine's steps, as last reported by the engine."""
        submission = self.job.submission
        return StepDemand.of(submission.caller, submission.priority, submission.parameters, self._step)

    def cancel(self, reason: CancelReason) -> None:
        """Have the job end as CANCELLED, unless the claim is lost or has ended."""
        self._claim.change(self._state.cancelled(reason))

    def give_back(self) -> None:
        """Have the job wait again, for any replica, unless it is cancelled or the claim has ended."""
        self._claim.change(self._state.given_back())

    def lose(self) -> None:
        """Note that another replica has the job by now: nothing more of it is written or published here."""
        self._claim.change(self._state.lost())

    def receive(self, event: EngineEvent) -> None:
        """Take an event from the engine; in any state, without an effect once the claim is stopped."""
        self._tools.estimator.observe(self.job.job_id, event)
        if isinstance(event, StepFinished):
            self._step = event.step
        elif isinstance(event, RequestRestarted):
            self._step = event.resumed_from_step
        if isinstance(event, SnapshotTaken):
            self._snapshots.take(event)
        else:
            self._note(event)

    async def engine_request(self) -> EngineRequest | None:
        """The request for the engine; None where nothing is left to do. Call it once, before `run`."""
        try:
            snapshot = await self._claim.read_snapshot()
        except StopChangedError:
            return None
        job = self.job
        finished_images = frozenset(image.index for image in job.images)
        if len(finished_images) == job.submission.parameters.num_images:
            # Only the end of the job was not written.
            self.receive(RequestFinished())
            return None
        return EngineRequest(
            claim_id=self.claim_id,
            job_id=job.job_id,
            request_id=job.submission.request_id,
            parameters=job.submission.parameters,
            on_event=self.receive,
            snapshot=snapshot,
            finished_images=finished_images,
            caller=job.submission.caller,
            priority=job.submission.priority,
            deadline=self._deadline,
            trace=job.trace,
        )

    @property
    def _deadline(self) -> float | None:
        """The job's deadline on the engine's clock; a later one that a retry brings is not seen there."""
        if self.job.deadline_time is None:
            return None
        return time.monotonic() + self.job.deadline_time - self._tools.store.clock.now()

    async def run(self) -> None:
        """Apply the engine's events, to the end of the claim. Call it once.

        Raises:
            ClaimLostError: another replica has the job.
            StoreUnavailableError, StoreFullError: the job could not be given back.
        """
        snapshots = asyncio.create_task(self._snapshots.run())
        try:
            await self._apply_events()
            await self._write_end()
        finally:
            # Without `change`: no write waits for it any more.
            self._claim.state = self._state.ended()
            snapshots.cancel()
            self._close_spans()
        if self.job.state.has_ended:
            await self._claim.remove_snapshots()

    # --- the claim --------------------------------------------------------------------------------

    @property
    def _state(self) -> ClaimState:
        return self._claim.state

    def _note_change(self) -> None:
        self._note(None)

    def _note(self, event: EngineEvent | None) -> None:
        self._happened.put_nowait(_Happened(event, time.monotonic()))

    async def _apply_events(self) -> None:
        try:
            while self._state.is_running and not self.job.state.has_ended:
                happened = await self._happened.get()
                if happened.event is not None and self._state.is_running:
                    await self._apply(happened.event, happened.time)
                    self._observe(happened.event, happened.time)
        except StopChangedError:
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
                        await self._claim.end_cancelled()
                    case StopReason.GIVE_BACK:
                        await self._snapshots.store()
                        await self._claim.release()
                        return
                    case None:
                        await self._claim.end(JobState.FAILED, self._failure or JobInternalError.new())
            except StopChangedError:
                continue

    # --- the engine's events ----------------------------------------------------------------------

    async def _apply(self, event: EngineEvent, when: float) -> None:
        match event:
            case RequestStarted():
                await self._start(when)
            case PromptsEncoded(encode_seconds):
                self._claim.job = self.job.encoded(encode_seconds)
            case StepFinished(step, step_seconds):
                self._step_finished(step, step_seconds, when)
            case PreviewMade(step, data):
                self._feed.publish(Previewed(step, data))
            case RequestRestarted():
                self._restart(event)
            case ImageFinished():
                await self._claim.add_image(event)
            case RequestFinished():
                await self._claim.end(JobState.SUCCEEDED)
            case RequestFailed(error):
                await self._claim.end(JobState.FAILED, error)

    async def _start(self, when: float) -> None:
        execution = replace(self._tools.describe_execution(), attempt=self._first_attempt + 1)
        if self.job.state is JobState.RUNNING:
            await self._go_on(execution)
            return
        sequence = self._feed.reserve_sequence()
        started = self.job.started(execution, self._clock_time(when))
        await self._claim.save(replace(started, started_sequence=sequence, last_sequence=sequence))

    def _observe(self, event: EngineEvent, when: float) -> None:
        if self._spans.is_traced:
            now = self._tools.store.clock.now()
            self._spans.observe(event, self.job, self._clock_time(when), stored_time=now)

    def _close_spans(self) -> None:
        job = self.job
        if job.state is JobState.FAILED:
            self._spans.close(job.state.value, str(job.error))
        elif not job.state.has_ended and self._state.stop_reason is StopReason.LOST:
            self._spans.close("LOST", LOST_CLAIM)
        elif not job.state.has_ended and self._state.stop_reason is StopReason.GIVE_BACK:
            self._spans.close(JobState.QUEUED.value)
        else:
            self._spans.close(job.state.value)

    def _clock_time(self, when: float) -> float:
        """A moment on the clock of time.monotonic, in seconds since the epoch by the store's clock."""
        return self._tools.store.clock.now() - (time.monotonic() - when)

    async def _go_on(self, execution: Execution) -> None:
        """Restart a job whose replica is gone, from its snapshot where there is one."""
        step = 0 if self.job.snapshot is None else self.job.snapshot.step
        await self._claim.save(replace(self.job.restarted(execution.attempt, step), execution=execution))
        self._publish(Restarted(execution.attempt, LOST_SERVER, step))

    def _step_finished(self, step: int, step_seconds: float, when: float) -> None:
        if self._denoise_start is None:
            # The first step of an attempt is reported when it has ended.
            self._denoise_start = when - step_seconds
        job = self.job
        remaining_seconds = self._tools.estimator.remaining_seconds(job.job_id)
        total_steps = job.submission.parameters.num_inference_steps
        progress = Progress(step, total_steps, step_seconds, remaining_seconds)
        denoise_seconds = self._kept_denoise_seconds + when - self._denoise_start
        self._claim.job = job.progressed(progress, denoise_seconds)
        self._publish(Progressed(progress))

    def _restart(self, event: RequestRestarted) -> None:
        self._denoise_start = None
        self._kept_denoise_seconds = self.job.timings.denoise_seconds if event.resumed_from_step else 0.0
        attempt = self._first_attempt + event.attempt
        self._claim.job = self.job.restarted(attempt, event.resumed_from_step)
        self._publish(Restarted(attempt, event.reason, event.resumed_from_step))

    def _publish(self, body: Progressed | Restarted) -> None:
        self._tools.publish_to_replicas(self.job.job_id, self._feed.publish(body))
