"""Following one job, or all of them, through any number of connections."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from hidream.errors import StreamError
from hidream.events import Event, EventReader, Queued, Succeeded
from hidream.reconnecting import ReconnectPolicy, ResumableStream
from hidream.requests import with_request_id
from hidream.v1 import image_gen_pb2, job_pb2

MAX_RECONNECT_WINDOW_SECONDS = 30.0

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT", image_gen_pb2.WatchJobResponse, image_gen_pb2.GenerateResponse)


class _OneJob(ResumableStream[_RequestT, _ResponseT, Event]):
    """The events of one job; a connection that is lost costs none and repeats none."""

    def __init__(self, policy: ReconnectPolicy) -> None:
        super().__init__(policy)
        self._reader = EventReader()
        self._last_sequence = 0
        self._has_succeeded = False

    @property
    def is_over(self) -> bool:
        """Whether the job has succeeded; any other end raises."""
        return self._has_succeeded

    def read(self, response: _ResponseT) -> Event | None:
        """Return the event of one response; None for a piece that completes no image."""
        event = self._reader.read(response.job_id, response.event)
        self._last_sequence = response.event.sequence
        self._has_succeeded = isinstance(event, Succeeded)
        return event

    def ended(self) -> None:
        """Say that a call has ended with OK; raises StreamError when the job has not ended."""
        self._reader.finish()


class JobWatch(_OneJob[image_gen_pb2.WatchJobRequest, image_gen_pb2.WatchJobResponse]):
    """The events of a job that there is."""

    def __init__(self, job_id: str, policy: ReconnectPolicy, has_images: bool = True) -> None:
        super().__init__(policy)
        self.job_id = job_id
        self._has_images = has_images
        self._reader = EventReader(has_images)

    def request(self) -> image_gen_pb2.WatchJobRequest:
        """Return the request for what comes behind the last event."""
        return image_gen_pb2.WatchJobRequest(
            job_id=self.job_id,
            after_sequence=self._last_sequence,
            without_images=not self._has_images,
        )


class JobGeneration(_OneJob[image_gen_pb2.GenerateRequest, image_gen_pb2.GenerateResponse]):
    """The events of a job that stops when its caller leaves it.

    The request gets an id of its own, by which the call that is made again finds the job.
    """

    def __init__(self, request: image_gen_pb2.GenerateRequest, policy: ReconnectPolicy) -> None:
        super().__init__(policy)
        # With an id of the caller's others may wait for the same job, which leaving must not stop.
        self._is_held = not request.request_id and not request.detached
        self._request = with_request_id(request)
        self._position: int | None = None
        if not request.detached:
            self.request_id = self._request.request_id
        if self._is_held:
            self.held_seconds = min(max(0.0, policy.reconnect_seconds), MAX_RECONNECT_WINDOW_SECONDS)
            self._request.reconnect_window.FromTimedelta(timedelta(seconds=self.held_seconds))

    @property
    def held_job_id(self) -> str:
        """The job that the server would hold for nobody if the caller left now.

        Empty where there is none, and while the connection is lost: then the error has told how to go on.
        """
        return self.job_id if self._is_held and not (self.is_over or self.is_lost) else ""

    def request(self) -> image_gen_pb2.GenerateRequest:
        """Return the same request each time: by its id it follows the same job."""
        return self._request

    def read(self, response: image_gen_pb2.GenerateResponse) -> Event | None:
        """Return the event of one response; None for what came before, and for parts of images."""
        if response.job_id != self.job_id:
            # The first job, or the one in place of a job that was given up while nobody could be reached.
            self.job_id, self._last_sequence, self._reader = response.job_id, 0, EventReader()
        if response.event.sequence <= self._last_sequence and not self._is_new_position(response.event):
            return None
        last_sequence = max(self._last_sequence, response.event.sequence)
        event = super().read(response)
        self._last_sequence = last_sequence
        self._position = event.queue_position if isinstance(event, Queued) else None
        return event

    def _is_new_position(self, event: job_pb2.JobEvent) -> bool:
        """Whether it tells a waiting job's new position: a server that was started again counts anew."""
        if self._position is None or not event.HasField("queued"):
            return False
        return event.queued.queue_position != self._position


@dataclass(frozen=True, slots=True, repr=False)
class JobChange:
    """A job as it is after a change of its state.

    Attributes:
        job: the job.
        time: when the change happened, by the server's clock.
    """

    job: job_pb2.Job
    time: datetime

    def __repr__(self) -> str:
        state = job_pb2.JobState.Name(self.job.state)
        return f"JobChange(job_id={self.job.job_id!r}, state={state}, time={self.time!r})"


class AllJobsWatch(
    ResumableStream[image_gen_pb2.WatchJobsRequest, image_gen_pb2.WatchJobsResponse, JobChange]
):
    """The changes of all jobs, without end.

    Every connection begins with the jobs that match then; those that were reported before, in the
    same state, are left out.
    """

    def __init__(self, request: image_gen_pb2.WatchJobsRequest, policy: ReconnectPolicy) -> None:
        super().__init__(policy)
        self._request = request
        self._states: dict[str, job_pb2.JobState.ValueType] = {}

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come, which is never so."""
        return False

    def request(self) -> image_gen_pb2.WatchJobsRequest:
        """Return the same request each time: there is no position to go on from."""
        return self._request

    def read(self, response: image_gen_pb2.WatchJobsResponse) -> JobChange | None:
        """Return the change; None for a state that was reported before."""
        job = response.job
        if self._states.get(job.job_id) == job.state:
            return None
        self._states[job.job_id] = job.state
        return JobChange(job, response.change_time.ToDatetime(tzinfo=UTC))

    def ended(self) -> None:
        """Say that a call has ended with OK, which is a StreamError: only the caller ends the stream."""
        raise StreamError("the stream of changes ended")
