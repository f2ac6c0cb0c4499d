"""The newest of the jobs that wait finds its place in the order of the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.jobs.store.order import (
    TURNS_PER_OLDEST,
    CallerLoads,
    WaitingJob,
    claim_order,
    num_before_newest,
)

CALLERS = st.sampled_from("abcd")
PRIORITIES = st.sampled_from([10, 20, 30])
WAITING = st.lists(st.tuples(CALLERS, PRIORITIES, st.booleans()), max_size=24)
LAST_TURNS = st.dictionaries(CALLERS, st.integers(1, 2 * TURNS_PER_OLDEST))


@given(WAITING, LAST_TURNS, st.integers(0, 24), CALLERS, PRIORITIES)
def test_the_newest_job_is_placed_as_by_a_new_order_of_all(
    waiting: list[tuple[str, int, bool]],
    last_turns: dict[str, int],
    newest_start: int,
    caller: str,
    priority: int,
) -> None:
    jobs = [WaitingJob(number, str(number), *facts) for number, facts in enumerate(waiting)]
    newest = WaitingJob(len(jobs), "newest", caller, priority)
    loads = CallerLoads(last_turns, newest_start=newest_start)
    order = claim_order(jobs, loads)
    num_before = num_before_newest(list(order), newest, last_turns, order.due)
    assert num_before == list(claim_order([*jobs, newest], loads)).index(newest)
