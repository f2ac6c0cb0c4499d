"""Which rank hangs in a plan, or a join, that does not end. Pure: no clock, no process, no torch.

A rank that has not answered hangs if it is in no collective and either is idle, or computes far longer than
such a plan ever took. A rank that waits for a core does not hang: it is runnable, and its CPU time hardly
grows. Ranks that wait in a collective wait for another rank; if all ranks wait, they wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankSample:
    """The state of a rank that has not answered, at one moment.

    Attributes:
        is_waiting: whether the rank is in a collective.
        num_collectives: how often the rank has entered or left a collective; grows with its progress.
        is_runnable: whether the rank computes, or would if it had a core.
        cpu_seconds: CPU time that the rank has used so far.
    """

    is_waiting: bool
    num_collectives: int
    is_runnable: bool
    cpu_seconds: float


class HangDetector:
    """Finds the ranks that hang in one plan, or one join.

    Args:
        limit_seconds: how long a rank may be idle, and how long one of its threads may compute.
        num_threads: threads that a rank computes with.
        may_all_wait: whether all observed ranks may wait for a process that is not among them.
    """

    def __init__(self, limit_seconds: float, num_threads: int, *, may_all_wait: bool = False) -> None:
        self._may_all_wait = may_all_wait
        self._limit_seconds = limit_seconds
        self._cpu_limit_seconds = limit_seconds * num_threads
        self._before: dict[int, RankSample] = {}
        self._first_cpu_seconds: dict[int, float] = {}
        self._idle_seconds: dict[int, float] = {}

    def observe(self, samples: Mapping[int, RankSample], elapsed_seconds: float) -> dict[int, str]:
        """Note a sample of all ranks that have not answered.

        Args:
            samples: the samples by rank.
            elapsed_seconds: time since the previous call.

        Returns:
            The ranks that hang, each with the reason in words.
        """
        for rank, sample in samples.items():
            before = self._before.get(rank)
            self._first_cpu_seconds.setdefault(rank, sample.cpu_seconds)
            self._idle_seconds[rank] = (
                self._idle_seconds[rank] + elapsed_seconds if before and not _moves(sample, before) else 0.0
            )
        self._before = dict(samples)
        suspects = [rank for rank, sample in samples.items() if not sample.is_waiting]
        if suspects:
            return {rank: why for rank in suspects if (why := self._why(rank, samples[rank]))}
        wait_for_ever = all(self._idle_seconds[rank] > self._limit_seconds for rank in samples)
        if wait_for_ever and not self._may_all_wait:
            return dict.fromkeys(samples, "all ranks wait for each other")
        return {}

    def _why(self, rank: int, sample: RankSample) -> str | None:
        if self._idle_seconds[rank] > self._limit_seconds:
            return f"does nothing since {self._idle_seconds[rank]:.0f} s"
        cpu_seconds = sample.cpu_seconds - self._first_cpu_seconds[rank]
        if cpu_seconds > self._cpu_limit_seconds:
            return f"has computed for {cpu_seconds:.0f} s"
        return None


def _moves(sample: RankSample, before: RankSample) -> bool:
    return (
        sample.is_runnable
        or sample.cpu_seconds > before.cpu_seconds
        or sample.num_collectives != before.num_collectives
    )
