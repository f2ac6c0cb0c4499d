"""Events that replicas publish to each other and that stand in no row: they are kept nowhere."""

from __future__ import annotations

import logging
import math
import time

import msgspec

from hidream_grpc.background import BackgroundTasks
from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.job import Progress
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobEvent, Progressed, Restarted

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL_SECONDS = 0.25
"""Seconds between two publications of a job's progress to other replicas."""


class RelayedEvent(msgspec.Struct, frozen=True, tag="relayed"):
    """An event of a job that runs at another replica: its progress or a restart."""

    sequence: int
    time: float
    progress: Progress | None = None
    restarted: Restarted | None = None

    @classmethod
    def of(cls, event: JobEvent) -> RelayedEvent:
        """The message of an event of progress or of a restart."""
        if isinstance(event.body, Restarted):
            return cls(event.sequence, event.time, restarted=event.body)
        assert isinstance(event.body, Progressed)
        return cls(event.sequence, event.time, progress=event.body.progress)

    def event(self) -> JobEvent | None:
        """The event; None when a newer version of the service sent something else."""
        body = self.restarted or (None if self.progress is None else Progressed(self.progress))
        return None if body is None else JobEvent(self.sequence, self.time, body)


_decoder = msgspec.json.Decoder(RelayedEvent)


def decode(payload: bytes) -> RelayedEvent | None:
    """The message in a payload; None for one that only another version of the service knows."""
    try:
        return _decoder.decode(payload)
    except msgspec.MsgspecError as error:
        logger.debug("a message of another version: %s", error)
        return None


class ReplicaPublisher:
    """Publishes progress, now and then, and every restart to other replicas, where there can be any.

    It does not wait for the store: what is published during an outage is lost. Jobs that step together tell
    it at once, and what comes while the store is busy goes out together.
    """

    def __init__(self, store: SqlJobStore) -> None:
        self._store = store
        self._tasks = BackgroundTasks()
        self._publish_times: dict[str, float] = {}
        self._unsent: list[tuple[str, bytes]] = []
        self._is_sending = False

    def publish(self, job_id: str, event: JobEvent) -> None:
        """Pass an event on, unless progress was passed on just now."""
        if not self._store.is_shared:
            return
        now = time.monotonic()
        is_progress = isinstance(event.body, Progressed)
        if is_progress and now - self._publish_times.get(job_id, -math.inf) < PUBLISH_INTERVAL_SECONDS:
            return
        self._publish_times[job_id] = now
        self._unsent.append((job_id, msgspec.json.encode(RelayedEvent.of(event))))
        if not self._is_sending:
            self._is_sending = True
            self._tasks.start(self._send(), "publish to other replicas")

    async def _send(self) -> None:
        try:
            while self._unsent:
                least = time.monotonic() - PUBLISH_INTERVAL_SECONDS
                self._publish_times = {j: then for j, then in self._publish_times.items() if then > least}
                unsent, self._unsent = self._unsent, []
                try:
                    await self._store.publish(unsent)
                except HiDreamError as error:
                    logger.debug("events did not reach other replicas: %s", error)
        finally:
            self._is_sending = False
