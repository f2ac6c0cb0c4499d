"""The jobs that wait: by priority, callers taking turns, then by age. Pure."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from hidream_grpc.jobs.job import Priority


class JobQueue:
    """Who is next. Within a priority each caller gives one job in turn, its oldest.

    So a caller's batch of a hundred does not keep another's single job waiting.
    """

    def __init__(self) -> None:
        self._callers: dict[Priority, OrderedDict[str, deque[str]]] = {
            priority: OrderedDict() for priority in sorted(Priority, reverse=True)
        }
        self._places: dict[str, tuple[Priority, str]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def push(self, job_id: str, priority: Priority, caller: str) -> None:
        """Put a job behind the others of its caller."""
        self._callers[priority].setdefault(caller, deque()).append(job_id)
        self._places[job_id] = (priority, caller)

    def pop(self, may_start: Callable[[str], bool] = lambda caller: True) -> str | None:
        """Remove and return the next job of a caller of whom one may start; its turn is over."""
        for callers in self._callers.values():
            caller = next(filter(may_start, callers), None)
            if caller is not None:
                jobs = callers[caller]
                job_id = jobs.popleft()
                del self._places[job_id]
                if jobs:
                    callers.move_to_end(caller)
                else:
                    del callers[caller]
                return job_id
        return None

    def num_waiting(self, caller: str) -> int:
        """Jobs of a caller, whatever their priority."""
        return sum(len(callers.get(caller, ())) for callers in self._callers.values())

    def remove(self, job_id: str) -> bool:
        """Take a job out, wherever it stands; False when it does not wait."""
        place = self._places.pop(job_id, None)
        if place is None:
            return False
        priority, caller = place
        jobs = self._callers[priority][caller]
        jobs.remove(job_id)
        if not jobs:
            del self._callers[priority][caller]
        return True

    def order(self) -> list[str]:
        """All waiting jobs in the order in which they will be taken."""
        ordered: list[str] = []
        for callers in self._callers.values():
            turns = [deque(jobs) for jobs in callers.values()]
            while turns:
                ordered.extend(jobs.popleft() for jobs in turns)
                turns = [jobs for jobs in turns if jobs]
        return ordered
