"""The jobs of this server: accept, queue, follow, cancel, keep for a while."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from hidream_grpc.engine.requests import (
    EngineEvent,
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
from hidream_grpc.errors import (
    CallerQueueFullError,
    DeadlineExceededError,
    HiDreamError,
    JobCancelledError,
    JobInternalError,
    NotServingError,
    QueueFullError,
    RequestIdConflictError,
)
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.events import JobEvent, JobFeed, Queued
from hidream_grpc.jobs.job import CancelReason, Execution, Job, JobState, Submission
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.outlook import Outlook
from hidream_grpc.jobs.queue import JobQueue
from hidream_grpc.jobs.quotas import CallerQuotas
from hidream_grpc.jobs.record import JobRecord

logger = logging.getLogger(__name__)

START_RETRY_SECONDS = 2.0
MIN_RETRY_SECONDS = 1.0
POSITIONS_SECONDS = 1.0
"""How often those that wait are told, at least, when what they can expect has changed."""


class Engine(Protocol):
    """What the service asks of the engine (`engine/controller.py`)."""

    def notify(self) -> None:
        """Say that a job waits."""

    def cancel(self, job_id: str) -> None:
        """Drop a running job at its next step."""


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How long jobs that have ended are kept, with their images."""

    retention_seconds: float
    max_retained_jobs: int


class JobService:
    """Owns every job from its acceptance to its removal. Belongs to the event loop's thread.

    It is the engine's backlog: the engine takes a job whenever it has room for one.
    """

    def __init__(
        self,
        limits: RequestLimits,
        retention: RetentionPolicy,
        artifacts: ArtifactStore,
        engine: Engine,
        describe_execution: Callable[[], Execution],
        outlook: Outlook,
    ) -> None:
        self._limits = limits
        self._retention = retention
        self._artifacts = artifacts
        self._engine = engine
        self._describe_execution = describe_execution
        self._outlook = outlook
        self._positions_time = 0.0
        self._records: dict[str, JobRecord] = {}
        self._job_ids: dict[tuple[str, str], str] = {}
        self._ended: deque[str] = deque()
        self._removals: set[asyncio.Task[None]] = set()
        self._queue = JobQueue()
        self._quotas = CallerQuotas(limits.max_pixel_steps_per_minute_per_caller, time.monotonic)
        self._callers_of_running: dict[str, str] = {}
        self._counts: Counter[JobState] = Counter()
        self._num_accepted = 0
        self._engine_state = EngineState.STARTING
        self._is_draining = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()
        self._num_readers = 0
        self._nobody_reads = asyncio.Event()
        self._nobody_reads.set()

    # --- what the server asks ---------------------------------------------------------------------

    @property
    def num_queued(self) -> int:
        """Jobs that wait now."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Jobs that are being drawn now."""
        return len(self._records) - len(self._ended) - len(self._queue)

    @property
    def num_accepted(self) -> int:
        """Jobs accepted since the start."""
        return self._num_accepted

    def num_ended(self, state: JobState) -> int:
        """Jobs that ended in a state since the start."""
        return self._counts[state]

    @property
    def engine_state(self) -> EngineState:
        """Whether the rank group can work."""
        return self._engine_state

    @property
    def is_draining(self) -> bool:
        """Whether nothing more is accepted."""
        return self._is_draining

    @property
    def takes_requests(self) -> bool:
        """Whether a request is accepted where the queue has room for it."""
        return self._engine_state.takes_requests and not self._is_draining

    @property
    def retry_after_seconds(self) -> float:
        """When a place in the queue is likely to be free."""
        return max(MIN_RETRY_SECONDS, self._outlook.next_start_seconds or 0.0)

    def submit(self, submission: Submission, owner: str = "") -> Job:
        """Accept a request, or follow up on the one of this owner that has its request id.

        Raises:
            NotServingError: the engine is starting, has failed, or the service drains.
            QueueFullError, CallerQueueFullError: too many jobs wait.
            CallerQuotaError: the caller has asked for too much within a minute.
            RequestIdConflictError: the request id was used with another request.
        """
        if known := self._job_ids.get((owner, submission.request_id)):
            return self._follow_up(self._records[known], submission)
        self._check_serving()
        with self._quotas.charged(submission.caller, submission.parameters.pixel_steps):
            self._check_room(submission.caller)
        job = Job(job_id=uuid.uuid4().hex, submission=submission, create_time=time.time(), owner=owner)
        record = JobRecord(job, JobFeed(self._limits.chunk_bytes))
        self._records[job.job_id] = record
        self._job_ids[owner, submission.request_id] = job.job_id
        self._num_accepted += 1
        self._all_ended.clear()
        if submission.deadline_seconds is not None and not submission.is_detached:
            self._stop_after(record, submission.deadline_seconds)
        self._queue.push(job.job_id, submission.priority, submission.caller)
        self._publish_positions()
        self._engine.notify()
        return job

    async def follow(self, job_id: str, after_sequence: int = 0) -> AsyncGenerator[JobEvent]:
        """The job's events after a sequence, to its end; the job must be known.

        Its images stay until the generator is closed, even if its retention ends before.
        """
        record = self._records[job_id]
        record.num_readers += 1
        self._num_readers += 1
        self._nobody_reads.clear()
        try:
            async for event in record.feed.follow(after_sequence):
                yield event
        finally:
            record.num_readers -= 1
            self._num_readers -= 1
            if self._num_readers == 0:
                self._nobody_reads.set()
            if record.is_forgotten:
                self._remove_unread_images(record)

    def has_readers(self, job_id: str) -> bool:
        """Whether somebody follows the job now."""
        record = self._records.get(job_id)
        return record is not None and record.num_readers > 0

    async def read_image(self, job_id: str, index: int, offset: int, length: int) -> bytes:
        """A part of a finished image."""
        return await self._artifacts.read(job_id, index, offset, length)

    def cancel(self, job_id: str, reason: CancelReason) -> None:
        """Stop a job: a running one takes no further step. Nothing happens to one that has ended."""
        record = self._records.get(job_id)
        if record is None or record.has_ended:
            return
        is_late = reason is CancelReason.DEADLINE
        self._stop_work(job_id)
        record.cancel(reason, DeadlineExceededError(job_id) if is_late else JobCancelledError(job_id))
        self._close(record)

    async def drain(self, grace_seconds: float) -> None:
        """Accept nothing more, let accepted jobs end and be read; after the grace period fail the rest."""
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_seconds):
                await self._all_ended.wait()
                await self._nobody_reads.wait()
        except TimeoutError:
            for record in [r for r in self._records.values() if not r.has_ended]:
                self._fail(record, NotServingError("the server is shutting down", START_RETRY_SECONDS))

    # --- what the engine asks ---------------------------------------------------------------------

    def set_engine_state(self, state: EngineState) -> None:
        """Note whether the rank group can work."""
        self._engine_state = state

    def take(self) -> EngineRequest | None:
        """The engine's next job (`engine.requests.Backlog`)."""
        job_id = self._queue.pop(self._may_start)
        if job_id is None:
            return None
        record = self._records[job_id]
        self._outlook.note_taken(record.job)
        self._publish_positions()
        submission = record.job.submission
        self._callers_of_running[job_id] = submission.caller
        return EngineRequest(
            job_id=job_id,
            request_id=submission.request_id,
            parameters=submission.parameters,
            on_event=lambda event: self._on_event(record, event),
        )

    def _on_event(self, record: JobRecord, event: EngineEvent) -> None:
        if record.has_ended:
            return
        self._outlook.observe(record.job.job_id, event)
        match event:
            case RequestStarted():
                record.start(self._describe_execution())
            case PromptsEncoded(encode_seconds):
                record.encoded(encode_seconds)
            case StepFinished(step, step_seconds):
                remaining_seconds = self._outlook.remaining_seconds(record.job.job_id)
                record.step_finished(step, step_seconds, remaining_seconds)
                if time.monotonic() - self._positions_time > POSITIONS_SECONDS:
                    self._publish_positions()
            case PreviewMade(step, data):
                record.previewed(step, data)
            case RequestRestarted(attempt, reason, resumed_from_step):
                record.restart(attempt, reason, resumed_from_step)
            case ImageFinished():
                record.tasks.add(asyncio.create_task(self._store(record, event)))
            case RequestFinished():
                record.tasks.add(asyncio.create_task(self._succeed(record)))
            case RequestFailed(error):
                self._fail(record, error)

    async def _store(self, record: JobRecord, event: ImageFinished) -> None:
        job = record.job
        try:
            image = await self._artifacts.write(
                job.job_id, event.image_index, job.submission.parameters, event.data
            )
        except HiDreamError as error:
            self._fail(record, error)
            return
        except Exception:
            # Whatever it is: a job must end.
            failure = JobInternalError.new()
            logger.exception(
                "cannot store an image",
                extra={
                    "job_id": job.job_id,
                    "request_id": job.submission.request_id,
                    "error_id": failure.error_id,
                },
            )
            self._fail(record, failure)
            return
        if not record.has_ended:
            record.add_image(image, event.decode_seconds)

    async def _succeed(self, record: JobRecord) -> None:
        await asyncio.gather(*(task for task in record.tasks if task is not asyncio.current_task()))
        if not record.has_ended:
            record.succeed()
            self._close(record)

    def _fail(self, record: JobRecord, error: HiDreamError) -> None:
        if not record.has_ended:
            self._stop_work(record.job.job_id)
            record.fail(error)
            self._close(record)

    # --- the rest ---------------------------------------------------------------------------------

    def _check_serving(self) -> None:
        if self._is_draining:
            raise NotServingError("the server is shutting down", START_RETRY_SECONDS)
        if self._engine_state is EngineState.STARTING:
            raise NotServingError("the model is loading", START_RETRY_SECONDS)
        if not self.takes_requests:
            raise NotServingError("the devices are not available", START_RETRY_SECONDS)

    def _check_room(self, caller: str) -> None:
        limits = self._limits
        if self.num_queued >= limits.max_queued_jobs:
            raise QueueFullError(limits.max_queued_jobs, self.retry_after_seconds)
        max_of_caller = limits.max_queued_jobs_per_caller
        if max_of_caller is not None and self._queue.num_waiting(caller) >= max_of_caller:
            raise CallerQueueFullError(caller, max_of_caller, self.retry_after_seconds)

    def _may_start(self, caller: str) -> bool:
        max_of_caller = self._limits.max_running_jobs_per_caller
        running = self._callers_of_running.values()
        return max_of_caller is None or sum(other == caller for other in running) < max_of_caller

    def _follow_up(self, record: JobRecord, submission: Submission) -> Job:
        job = record.job
        same = replace(submission, deadline_seconds=job.submission.deadline_seconds)
        if same != job.submission:
            raise RequestIdConflictError(submission.request_id, job.job_id)
        if record.deadline is not None and not record.has_ended:
            self._extend_deadline(record, record.deadline, submission.deadline_seconds)
        return job

    def _extend_deadline(
        self, record: JobRecord, deadline: asyncio.TimerHandle, deadline_seconds: float | None
    ) -> None:
        """Of several callers the one with the latest deadline decides; None is for ever."""
        if deadline_seconds is None:
            deadline.cancel()
            record.deadline = None
        elif asyncio.get_running_loop().time() + deadline_seconds > deadline.when():
            deadline.cancel()
            self._stop_after(record, deadline_seconds)

    def _stop_after(self, record: JobRecord, deadline_seconds: float) -> None:
        record.deadline = asyncio.get_running_loop().call_later(
            deadline_seconds, self.cancel, record.job.job_id, CancelReason.DEADLINE
        )

    def _stop_work(self, job_id: str) -> None:
        if self._queue.remove(job_id):
            self._publish_positions()
        else:
            self._engine.cancel(job_id)

    def _publish_positions(self) -> None:
        self._positions_time = time.monotonic()
        waiting = [self._records[job_id] for job_id in self._queue.order()]
        self._outlook.note_waiting([record.job for record in waiting])
        for position, record in enumerate(waiting, start=1):
            record.feed.publish_if_new(Queued(position, self._outlook.wait_seconds(record.job.job_id)))

    def _close(self, record: JobRecord) -> None:
        """Book a job that has just ended, and see to its removal."""
        job = record.job
        self._counts[job.state] += 1
        self._outlook.note_gone(job.job_id)
        if self._callers_of_running.pop(job.job_id, None) is not None:
            # One that waited for its caller's others may start now.
            self._engine.notify()
        self._ended.append(job.job_id)
        if job.state is not JobState.SUCCEEDED:
            # A retry of what was not drawn must draw it.
            self._release_request_id(job)
        if record.deadline is not None:
            record.deadline.cancel()
        loop = asyncio.get_running_loop()
        record.expiry = loop.call_later(self._retention.retention_seconds, self._remove, job.job_id)
        while len(self._ended) > self._retention.max_retained_jobs:
            self._remove(self._ended[0])
        if len(self._ended) == len(self._records):
            self._all_ended.set()
        logger.info(
            "job %s",
            job.state.lower(),
            extra={
                "job_id": job.job_id,
                "request_id": job.submission.request_id,
                "total_seconds": round(job.timings.total_seconds, 3),
            },
        )

    def _remove(self, job_id: str) -> None:
        record = self._records.pop(job_id)
        self._ended.remove(job_id)
        self._release_request_id(record.job)
        if record.expiry is not None:
            record.expiry.cancel()
        record.is_forgotten = True
        self._remove_unread_images(record)

    def _release_request_id(self, job: Job) -> None:
        # Another job may have it by now.
        if self._job_ids.get((job.owner, job.submission.request_id)) == job.job_id:
            del self._job_ids[job.owner, job.submission.request_id]

    def _remove_unread_images(self, record: JobRecord) -> None:
        if record.num_readers == 0:
            removal = asyncio.create_task(self._remove_images(record))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    async def _remove_images(self, record: JobRecord) -> None:
        # A write that ends later would leave its file behind.
        await asyncio.gather(*record.tasks, return_exceptions=True)
        await self._artifacts.remove(record.job.job_id)
