"""Watching one job, or all of them, through any number of connections."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hidream.errors import StreamError
from hidream.events import Event, EventReader, Succeeded
from hidream.reconnecting import ReconnectPolicy, ResumableStream
from hidream.v1 import image_gen_pb2, job_pb2


class JobWatch(ResumableStream[image_gen_pb2.WatchJobRequest, image_gen_pb2.WatchJobResponse, Event]):
    """The events of one job; a connection that is lost costs none and repeats none."""

    def __init__(self, job_id: str, policy: ReconnectPolicy) -> None:
        super().__init__(policy)
        self._job_id = job_id
        self._reader = EventReader()
        self._last_sequence = 0
        self._has_succeeded = False

    @property
    def is_over(self) -> bool:
        """Whether the job has succeeded; any other end raises."""
        return self._has_succeeded

    def request(self) -> image_gen_pb2.WatchJobRequest:
        """Return the request for what comes behind the last event."""
        return image_gen_pb2.WatchJobRequest(job_id=self._job_id, after_sequence=self._last_sequence)

    def read(self, response: image_gen_pb2.WatchJobResponse) -> Event | None:
        """Return the event of one response; None for a piece that completes no image."""
        event = self._reader.read(response.job_id, response.event)
        self._last_sequence = response.event.sequence
        self._has_succeeded = isinstance(event, Succeeded)
        return event

    def ended(self) -> None:
        """Say that a call has ended with OK; raises StreamError when the job has not ended."""
        self._reader.finish()


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
        """Return the same request each time: there is no place to go on from."""
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
