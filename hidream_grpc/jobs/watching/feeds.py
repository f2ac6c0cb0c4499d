"""The feeds of the jobs that run or are followed at this server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hidream_grpc.errors import HiDreamError
from hidream_grpc.jobs.watching.events import JobFeed


@dataclass(slots=True)
class _Entry:
    """A feed, and how many need it."""

    feed: JobFeed
    num_users: int = 0
    num_readers: int = 0


class JobFeeds:
    """One feed for each job, however many need it; a feed that is not needed any more is forgotten."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Take a clock that gives seconds since the epoch."""
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._closing_error: HiDreamError | None = None

    @contextmanager
    def used(self, job_id: str, *, is_reader: bool) -> Iterator[JobFeed]:
        """The feed of a job, kept until the block ends."""
        entry = self._entries.setdefault(job_id, _Entry(JobFeed(self._clock)))
        entry.num_users += 1
        entry.num_readers += is_reader
        if self._closing_error is not None:
            entry.feed.close(self._closing_error)
        try:
            yield entry.feed
        finally:
            entry.num_users -= 1
            entry.num_readers -= is_reader
            if entry.num_users == 0:
                del self._entries[job_id]

    def get(self, job_id: str) -> JobFeed | None:
        """The feed of a job, where one is in use."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.feed

    @property
    def job_ids(self) -> tuple[str, ...]:
        """Ids of the jobs whose feeds are in use."""
        return tuple(self._entries)

    def has_readers(self, job_id: str) -> bool:
        """Whether the job is followed or read at this server."""
        entry = self._entries.get(job_id)
        return entry is not None and entry.num_readers > 0

    @property
    def num_readers(self) -> int:
        """Number of readers over all jobs."""
        return sum(entry.num_readers for entry in self._entries.values())

    def close(self, error: HiDreamError) -> None:
        """End all readers of jobs that have not ended, those to come included, with an error."""
        self._closing_error = error
        for entry in self._entries.values():
            entry.feed.close(error)
