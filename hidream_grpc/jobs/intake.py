"""From requests to jobs: all of a call are accepted, or none, and of each caller only so much a minute."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from hidream_grpc.errors import (
    CallerQuotaError,
    FieldViolation,
    InvalidRequestError,
    JobNotFoundError,
    RequestError,
)
from hidream_grpc.jobs.job import Job, Submission
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.store.records import AttachedCall, QueueLimits
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.traces import current_trace

WINDOW_SECONDS = 60.0
"""The time in which the work of each caller is limited."""


class JobIntake:
    """Accepts the requests that the limits of the queue and of each caller allow.

    Args:
        wait_for_end: waits for the end of a job, by its id; may raise JobNotFoundError.
    """

    def __init__(
        self, store: SqlJobStore, limits: RequestLimits, wait_for_end: Callable[[str], Awaitable[None]]
    ) -> None:
        self._store = store
        self._limits = limits
        self._wait_for_end = wait_for_end
        self._quotas = CallerQuotas(limits.max_pixel_steps_per_minute_per_caller, time.monotonic)
        self.num_accepted = 0

    async def accept(
        self,
        submissions: Sequence[Submission],
        owner: str,
        retry_after_seconds: float,
        attached_call: AttachedCall | None = None,
        refusal: RequestError | None = None,
    ) -> tuple[Job, ...]:
        """Accept requests; return the job of each, a new one or the one with its request id, once durable.

        Args:
            refusal: why the requests cannot become new jobs; they can still find those that they became.

        Raises:
            QueueFullError, CallerQueueFullError: too many jobs wait.
            CallerQuotaError: the caller has asked for too much within a minute.
            RequestIdConflictError: a request id was used with another request.
            RequestError: the refusal, where not all requests have their jobs.
            StoreUnavailableError, StoreFullError: the store is lost or full.
        """
        now = self._store.clock.now()
        jobs = [_new_job(submission, owner, now) for submission in submissions]
        limits = QueueLimits(
            self._limits.max_queued_jobs, self._limits.max_queued_jobs_per_caller, retry_after_seconds
        )
        pixel_steps = 0 if refusal is not None else await self._new_pixel_steps(submissions, owner)
        with self._quotas.charged(submissions[0].caller, pixel_steps):
            while being_cancelled := _being_cancelled(
                jobs, accepted := await self._store.add(jobs, limits, attached_call, refusal)
            ):
                for job in being_cancelled:
                    with contextlib.suppress(JobNotFoundError):
                        await self._wait_for_end(job.job_id)
        self.num_accepted += sum(new.job_id == job.job_id for new, job in zip(jobs, accepted, strict=True))
        return accepted

    async def _new_pixel_steps(self, submissions: Sequence[Submission], owner: str) -> int:
        """Pixel steps of the requests that are no retries: only those are charged."""
        held: Collection[str] = ()
        if self._quotas.has_limit:
            held = await self._store.held_request_ids(owner, [s.request_id for s in submissions])
        return sum(s.parameters.pixel_steps for s in submissions if s.request_id not in held)


def _being_cancelled(given: Sequence[Job], accepted: Sequence[Job]) -> list[Job]:
    """Jobs that a retry found, which stop at their next step and then hold its request id no more."""
    pairs = zip(given, accepted, strict=True)
    return [
        job
        for new, job in pairs
        if job.job_id != new.job_id and job.cancel_reason is not None and not job.state.has_ended
    ]


def _new_job(submission: Submission, owner: str, now: float) -> Job:
    has_deadline = submission.deadline_seconds is not None and not submission.is_detached
    deadline_time = now + (submission.deadline_seconds or 0.0) if has_deadline else None
    call = current_trace()
    trace = None if call is None else call.child()
    return Job(uuid.uuid4().hex, submission, now, owner=owner, deadline_time=deadline_time, trace=trace)


@dataclass(frozen=True, slots=True, eq=False)
class _Charge:
    """Work that was accepted at one moment; two charges of the same amount stay distinct."""

    time: float
    pixel_steps: int


class CallerQuotas:
    """Counts the work of each caller: no 60 seconds hold more of it than the limit.

    A token bucket would let up to twice the limit through. It remembers one entry for each request that
    was accepted by this process in the last minute.
    """

    def __init__(self, max_pixel_steps_per_minute_per_caller: int | None, clock: Callable[[], float]) -> None:
        """Take the limit (None: everything is accepted) and a clock in seconds that never goes back."""
        self._max_pixel_steps = max_pixel_steps_per_minute_per_caller
        self._clock = clock
        self._charges: dict[str, deque[_Charge]] = {}

    @property
    def has_limit(self) -> bool:
        """Whether there is a limit, so that work is counted."""
        return self._max_pixel_steps is not None

    @contextlib.contextmanager
    def charged(self, caller: str, pixel_steps: int) -> Iterator[None]:
        """Charge a caller for work that is accepted within; an error from there takes the charge back.

        Raises:
            CallerQuotaError: the work does not fit now; the error says when it will.
            InvalidRequestError: the work would not fit into any minute.
        """
        if self._max_pixel_steps is None:
            yield
            return
        charge = self._charge(caller, pixel_steps, self._max_pixel_steps)
        try:
            yield
        except BaseException:
            self._take_back(caller, charge)
            raise

    def _charge(self, caller: str, pixel_steps: int, max_pixel_steps: int) -> _Charge:
        if pixel_steps > max_pixel_steps:
            description = (
                f"width × height × num_inference_steps × num_images, added up, must be at most "
                f"{max_pixel_steps} (max_pixel_steps_per_minute_per_caller), is {pixel_steps}"
            )
            raise InvalidRequestError((FieldViolation("requests", description),))
        now = self._clock()
        self._forget(now)
        charges = self._charges.get(caller, deque())
        excess = sum(charge.pixel_steps for charge in charges) + pixel_steps - max_pixel_steps
        if excess > 0:
            retry_after_seconds = _time_until_less(charges, excess) - now
            raise CallerQuotaError(caller, pixel_steps, max_pixel_steps, retry_after_seconds)
        charge = _Charge(now, pixel_steps)
        self._charges.setdefault(caller, charges).append(charge)
        return charge

    def _forget(self, now: float) -> None:
        """Drop the charges that have left the window, and callers without charges."""
        for caller, charges in list(self._charges.items()):
            while charges and charges[0].time + WINDOW_SECONDS <= now:
                charges.popleft()
            if not charges:
                del self._charges[caller]

    def _take_back(self, caller: str, charge: _Charge) -> None:
        # The charge may have left the window meanwhile.
        if charge in self._charges.get(caller, ()):
            self._charges[caller].remove(charge)


def _time_until_less(charges: deque[_Charge], excess: int) -> float:
    """The moment at which at least this much of the work will have left the window."""
    for charge in charges:
        excess -= charge.pixel_steps
        if excess <= 0:
            break
    return charge.time + WINDOW_SECONDS
