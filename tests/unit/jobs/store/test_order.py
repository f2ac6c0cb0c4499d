"""The newest of the jobs that wait finds its place in the order of the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.jobs.store.order import CallerLoads, WaitingJob, claim_order, num_before_newest

CALLERS = st.sampled_from("abcd")
PRIORITIES = st.sampled_from([10, 20, 30])
WAITING = st.lists(st.tuples(CALLERS, PRIORITIES, st.booleans()), max_size=24)
LAST_TURNS = st.dictionaries(CALLERS, st.integers(1, 9))


@given(WAITING, LAST_TURNS, CALLERS, PRIORITIES)
def test_the_newest_job_is_placed_as_by_a_new_order_of_all(
    waiting: list[tuple[str, int, bool]], last_turns: dict[str, int], caller: str, priority: int
) -> None:
    jobs = [WaitingJob(number, str(number), *facts) for number, facts in enumerate(waiting)]
    newest = WaitingJob(len(jobs), "newest", caller, priority)
    loads = CallerLoads(last_turns)
    num_before = num_before_newest(list(claim_order(jobs, loads)), newest, last_turns)
    assert num_before == list(claim_order([*jobs, newest], loads)).index(newest)
