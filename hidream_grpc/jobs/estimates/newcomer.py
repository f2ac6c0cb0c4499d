"""When a job that comes now would start and end, by the estimates of those that are there. Pure.

Nothing is simulated: a server that is too busy answers many such questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.simulation import EngineCapacity, Estimates, JobWork, seconds_alone
from hidream_grpc.jobs.store.step_room import StepRoom


def newcomer_start(
    new: JobWork,
    estimates: Estimates,
    capacity: EngineCapacity,
    running: Mapping[str, JobWork],
    waiting: Iterable[JobWork],
) -> float:
    """The earliest start of a job whose caller has the first turn of all, in seconds as in the estimates.

    It is the start of the job whose place it takes, and no later than the end of as many jobs as start before
    it and of one more. 0 where a step has room for it now.
    """
    room = StepRoom(
        (work.demand for work in running.values()),
        capacity.max_running_jobs,
        capacity.max_step_pixels,
        capacity.step_pixels_by_size,
    )
    if not running or room.take(new.demand):
        return 0.0
    others = [work for work in waiting if work.job_id not in running]
    num_before = _num_before(new, others)
    # Where so many are not estimated yet, the last one that is.
    start_seconds = sorted(estimates.ends.values())[: num_before + 1][-1:]
    if num_before < len(others) and (start := estimates.starts.get(others[num_before].job_id)) is not None:
        start_seconds.append(start)
    return min(start_seconds, default=0.0)


def newcomer_slowdown(
    estimates: Estimates, durations: MeasuredDurations, running: Iterable[JobWork], waiting: Iterable[JobWork]
) -> float:
    """How many times as long as alone a job takes from its start; 1 where no job tells."""
    if estimates.slowdown:
        return estimates.slowdown
    works = [work for work in (*running, *waiting) if work.job_id in estimates.ends]
    alone = sum(seconds_alone(durations, works))
    together = sum(estimates.ends[work.job_id] - estimates.starts.get(work.job_id, 0.0) for work in works)
    return together / alone if alone else 1.0


def _num_before(new: JobWork, waiting: Sequence[JobWork]) -> int:
    """Count the jobs that wait and start before a new one."""
    num_own = sum((work.caller, work.priority) == (new.caller, new.priority) for work in waiting)
    num_of_caller: Counter[str] = Counter()
    num_before = 0
    for work in waiting:
        if work.priority < new.priority:
            continue
        if work.priority == new.priority:
            num_of_caller[work.caller] += 1
            if num_of_caller[work.caller] > num_own:
                continue
        num_before += 1
    return num_before
