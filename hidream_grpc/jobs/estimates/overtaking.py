"""How long jobs wait that later ones overtake, while these go on coming as until now. Pure: no clock.

The order of the queue knows only the jobs that are there. One of low priority may be the next of them for a
long time; it starts for certain once `TURNS_PER_OLDEST` later ones have started before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hidream_grpc.jobs.store.order import TURNS_PER_OLDEST

MAX_JOBS = 256
"""Jobs of which it is known how often they were overtaken; those that were overtaken first are forgotten."""


@dataclass(slots=True)
class _Overtaken:
    num_starts: int
    first_time: float
    latest_time: float


class Overtaking:
    """How often later jobs of a higher priority have started before those that wait."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, _Overtaken] = OrderedDict()

    def note_start(self, overtaken_ids: Iterable[str], now: float) -> None:
        """Record that one job has started before all of these, which were accepted earlier."""
        for job_id in overtaken_ids:
            job = self._jobs.setdefault(job_id, _Overtaken(0, now, now))
            job.num_starts += 1
            job.latest_time = now
        while len(self._jobs) > MAX_JOBS:
            self._jobs.popitem(last=False)

    def forget(self, job_id: str) -> None:
        """Forget a job that waits no more."""
        self._jobs.pop(job_id, None)

    def seconds_to_come(self, job_id: str) -> float:
        """How long a job is still overtaken, at the pace of until now; 0 while that is not known."""
        job = self._jobs.get(job_id)
        if job is None or job.num_starts < 2:
            return 0.0
        pace_seconds = (job.latest_time - job.first_time) / (job.num_starts - 1)
        return pace_seconds * max(0, TURNS_PER_OLDEST - job.num_starts)
