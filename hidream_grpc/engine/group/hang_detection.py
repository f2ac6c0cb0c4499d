"""Which rank hangs in a plan, or a joining, that does not end. Pure: no clock, no process, no torch.

A rank that has not answered is to blame when it is in no collective and either does nothing at all, or
computes far longer than such a plan ever took. One that waits for a core is not: it is runnable, and its
CPU time hardly grows. Those that wait in a collective are victims of another one; if all do, of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankLook:
    """A rank that has not answered, at one moment.

    Attributes:
        is_waiting: whether it is in a collective.
        num_collectives: that it entered and left; grows with its progress.
        is_runnable: whether it computes, or would if it had a core.
        cpu_seconds: that it used up to now.
    """

    is_waiting: bool
    num_collectives: int
    is_runnable: bool
    cpu_seconds: float


class PlanWatch:
    """One plan, or one joining, under way.

    Args:
        limit_seconds: how long a rank may do nothing, and how long one thread of it may compute.
        num_threads: that a rank computes with.
        may_all_wait: whether all of them may wait for a process that is not among them.
    """

    def __init__(self, limit_seconds: float, num_threads: int, *, may_all_wait: bool = False) -> None:
        self._may_all_wait = may_all_wait
        self._limit_seconds = limit_seconds
        self._cpu_limit_seconds = limit_seconds * num_threads
        self._before: dict[int, RankLook] = {}
        self._first_cpu_seconds: dict[int, float] = {}
        self._idle_seconds: dict[int, float] = {}

    def look(self, looks: Mapping[int, RankLook], elapsed_seconds: float) -> dict[int, str]:
        """Take a look at all ranks that have not answered.

        Args:
            looks: by rank.
            elapsed_seconds: since the look before.

        Returns:
            Who hangs, and how that shows.
        """
        for rank, look in looks.items():
            before = self._before.get(rank)
            self._first_cpu_seconds.setdefault(rank, look.cpu_seconds)
            self._idle_seconds[rank] = (
                self._idle_seconds[rank] + elapsed_seconds if before and not _moves(look, before) else 0.0
            )
        self._before = dict(looks)
        suspects = [rank for rank, look in looks.items() if not look.is_waiting]
        if suspects:
            return {rank: why for rank in suspects if (why := self._why(rank, looks[rank]))}
        wait_for_ever = all(self._idle_seconds[rank] > self._limit_seconds for rank in looks)
        if wait_for_ever and not self._may_all_wait:
            return dict.fromkeys(looks, "all ranks wait for each other")
        return {}

    def _why(self, rank: int, look: RankLook) -> str | None:
        if self._idle_seconds[rank] > self._limit_seconds:
            return f"does nothing since {self._idle_seconds[rank]:.0f} s"
        cpu_seconds = look.cpu_seconds - self._first_cpu_seconds[rank]
        if cpu_seconds > self._cpu_limit_seconds:
            return f"has computed for {cpu_seconds:.0f} s"
        return None


def _moves(look: RankLook, before: RankLook) -> bool:
    return (
        look.is_runnable
        or look.cpu_seconds > before.cpu_seconds
        or look.num_collectives != before.num_collectives
    )


class StopWatch:
    """Which processes are stopped, and not only for a moment."""

    def __init__(self) -> None:
        self._before: frozenset[int] = frozenset()

    def look(self, stopped: frozenset[int]) -> frozenset[int]:
        """Take a look; returns those that were stopped at the look before too."""
        still_stopped = stopped & self._before
        self._before = stopped
        return still_stopped
