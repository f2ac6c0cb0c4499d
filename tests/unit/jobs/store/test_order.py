"""The order of waiting jobs: what it is, and that the newest job finds its place in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.jobs.store.order import TurnOrder, WaitingJob

CALLERS = st.sampled_from("abcd")
PRIORITIES = st.sampled_from([10, 20, 30])
WAITING = st.lists(st.tuples(CALLERS, PRIORITIES, st.booleans()), max_size=12)
ADDED = st.lists(st.tuples(CALLERS, PRIORITIES), max_size=6)
LAST_TURNS = st.dictionaries(CALLERS, st.integers(1, 5))


def in_turns(waiting: Sequence[WaitingJob], last_turns: Mapping[str, int]) -> list[WaitingJob]:
    """Begun jobs first; then, turn by turn, the highest priority's oldest job of the longest idle caller."""
    order = [job for job in waiting if job.was_begun]
    left = [job for job in waiting if not job.was_begun]
    turns = dict(last_turns)
    while left:
        highest = [job for job in left if job.priority == max(job.priority for job in left)]
        job = min(highest, key=lambda job: (turns.get(job.caller, 0), job.acceptance_number))
        turns[job.caller] = max(turns.values(), default=0) + 1
        left.remove(job)
        order.append(job)
    return order


@given(WAITING, LAST_TURNS, ADDED)
def test_callers_take_turns_and_the_newest_job_takes_its_place_among_them(
    waiting: list[tuple[str, int, bool]], last_turns: dict[str, int], added: list[tuple[str, int]]
) -> None:
    jobs = [
        WaitingJob(number, str(number), caller, priority, was_begun)
        for number, (caller, priority, was_begun) in enumerate(waiting)
    ]
    order = TurnOrder(reversed(jobs), last_turns)
    assert list(order) == in_turns(jobs, last_turns)
    for number, (caller, priority) in enumerate(added, start=len(jobs)):
        jobs.append(WaitingJob(number, str(number), caller, priority))
        num_before = order.add_newest(jobs[-1])
        expected = in_turns(jobs, last_turns)
        assert expected[num_before] == jobs[-1]
        assert list(order) == expected
