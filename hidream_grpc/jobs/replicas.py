"""What replicas tell each other of jobs, and no row tells: it is kept nowhere."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.events import JobEvent, Progressed, Restarted
from hidream_grpc.jobs.job import Progress
from hidream_grpc.jobs.store.store import SqlJobStore

logger = logging.getLogger(__name__)

TOLD_SECONDS = 0.25
"""How often progress is told to other replicas, for each job."""


class Told(msgspec.Struct, frozen=True, tag="told"):
    """An event of a job that is drawn elsewhere: one of the two."""

    sequence: int
    time: float
    progress: Progress | None = None
    restarted: Restarted | None = None

    @classmethod
    def of(cls, event: JobEvent) -> Told:
        """Of progress or a restart."""
        if isinstance(event.body, Restarted):
            return cls(event.sequence, event.time, restarted=event.body)
        assert isinstance(event.body, Progressed)
        return cls(event.sequence, event.time, progress=event.body.progress)

    def event(self) -> JobEvent | None:
        """The event; None when a newer version tells something else."""
        body = self.restarted or (None if self.progress is None else Progressed(self.progress))
        return None if body is None else JobEvent(self.sequence, self.time, body)


class CallerSought(msgspec.Struct, frozen=True, tag="caller_sought"):
    """The last caller at one replica went away: who has another says so."""


class CallerPresent(msgspec.Struct, frozen=True, tag="caller_present"):
    """A caller waits for the job at this replica."""


ReplicaMessage = Told | CallerSought | CallerPresent
_decoder: msgspec.json.Decoder[ReplicaMessage] = msgspec.json.Decoder(ReplicaMessage)


def decode(payload: bytes) -> ReplicaMessage | None:
    """A message; None for one that only another version of the service knows."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        logger.debug("a message of another version: %s", error)
        return None


class ReplicaTeller:
    """Tells other replicas, where there can be any, and does not wait for it."""

    def __init__(self, store: SqlJobStore) -> None:
        self._store = store
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, job_id: str, message: ReplicaMessage) -> None:
        """Send a message about a job; it is lost when the store is."""
        task = asyncio.create_task(self._publish(job_id, msgspec.json.encode(message)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _publish(self, job_id: str, payload: bytes) -> None:
        try:
            await self._store.publish(job_id, payload)
        except HiDreamError as error:
            logger.debug("other replicas were not told: %s", error)


class ProgressTeller:
    """Tells other replicas of progress now and then, and of every restart."""

    def __init__(self, store: SqlJobStore) -> None:
        self._is_shared = store.is_shared
        self._teller = ReplicaTeller(store)
        self._told: dict[str, float] = {}

    def tell(self, job_id: str, event: JobEvent) -> None:
        """Pass an event on, unless progress was passed on just now."""
        if not self._is_shared:
            return
        now = time.monotonic()
        is_progress = isinstance(event.body, Progressed)
        if is_progress and now - self._told.get(job_id, 0.0) < TOLD_SECONDS:
            return
        self._told = {other: told for other, told in self._told.items() if now - told < TOLD_SECONDS}
        self._told[job_id] = now
        self._teller.tell(job_id, Told.of(event))
