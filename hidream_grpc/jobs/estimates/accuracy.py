"""How far estimates were from what then came. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque

MIN_OUTCOMES = 8
"""Jobs that must have ended before the error of estimates counts as known."""
NUM_OUTCOMES = 64
"""Jobs that ended last, by which it is known."""
MAX_EXPECTED = 1024
"""Jobs whose ends are awaited; of more the oldest are forgotten, which another server may have run."""
EARLY_SHARE = 0.05
"""Share of the jobs that may end earlier still than what is called the earliest."""


class EstimateAccuracy:
    """Compares the first estimate of each job's end with the end."""

    def __init__(self) -> None:
        # When each job was estimated first, and in how many seconds it was to end then.
        self._expected: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._ratios: deque[float] = deque(maxlen=NUM_OUTCOMES)

    def expect(self, job_id: str, now: float, in_seconds: float) -> None:
        """Note an estimate; only the first one of a job that is more than nothing counts."""
        if in_seconds > 0 and job_id not in self._expected:
            self._expected[job_id] = now, in_seconds
            if len(self._expected) > MAX_EXPECTED:
                self._expected.popitem(last=False)

    def note_end(self, job_id: str, now: float) -> None:
        """Note that a job has ended by itself."""
        if (expected := self._expected.pop(job_id, None)) is not None:
            time, in_seconds = expected
            self._ratios.append((now - time) / in_seconds)

    def forget(self, job_id: str) -> None:
        """Note that a job was stopped or failed, which says nothing of its estimate."""
        self._expected.pop(job_id, None)

    @property
    def earliest_share(self) -> float | None:
        """What a job takes at the least, as a share of its estimate; None while too few jobs have ended."""
        if len(self._ratios) < MIN_OUTCOMES:
            return None
        return min(1.0, sorted(self._ratios)[int(EARLY_SHARE * len(self._ratios))])
