"""As many jobs run as a step serves; urgent and short ones and other callers are not held up."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.jobs.store.step_room import SHORT, StepDemand, StepRoom
from hidream_grpc.model.parameters import SampleSize

IMAGE = 1024 * 1024
BUDGET = 4 * IMAGE
LOW, NORMAL, HIGH = Priority


def demand(
    caller: str = "a",
    priority: Priority = NORMAL,
    num_images: int = 1,
    num_steps: int = 50,
    side: int = 1024,
) -> StepDemand:
    return StepDemand(caller, priority, SampleSize(side, side), side * side * num_images, num_steps)


def taken(running: list[StepDemand], *waiting: StepDemand, max_running_jobs: int = 16) -> list[int]:
    """Which of those that wait start."""
    room = StepRoom(running, max_running_jobs, BUDGET)
    return [number for number, waits in enumerate(waiting) if room.take(waits)]


def test_as_many_start_as_fill_a_step() -> None:
    assert taken([], *[demand()] * 6) == [0, 1, 2, 3]
    assert taken([demand(num_steps=3)] * 4, demand()) == []
    assert taken([], *[demand(side=512)] * 18) == list(range(16))


def test_what_is_decoded_leaves_the_step_to_others_but_counts() -> None:
    decoding = demand(num_steps=0)
    assert taken([decoding] * 4, *[demand()] * 6) == [0, 1, 2, 3]
    assert taken([decoding] * 4, *[demand()] * 6, max_running_jobs=5) == [0]


def test_a_job_that_does_not_fit_the_same_forward_waits_and_keeps_its_place() -> None:
    assert taken([demand()] * 2, demand(num_images=3, num_steps=20), demand(), demand()) == []


def test_a_job_larger_than_a_step_starts_when_nothing_else_steps() -> None:
    huge = demand(num_images=8, num_steps=10)
    assert taken([], huge, demand()) == [0]
    assert taken([demand()], huge) == []


def test_sizes_share_the_budget() -> None:
    running = [demand(side=768), demand(side=512, num_images=2)]
    assert taken(running, *[demand()] * 4) == [0, 1, 2]


@pytest.mark.parametrize("lower, higher", list(itertools.combinations(Priority, 2)))
def test_a_higher_priority_starts_whatever_runs_of_a_lower_one(lower: Priority, higher: Priority) -> None:
    full = [demand(priority=lower)] * 16
    assert taken(full, *[demand(priority=higher)] * 5) == [0, 1, 2, 3]
    assert taken([demand(priority=higher)] * 4, demand(priority=lower)) == []


def test_a_caller_that_runs_nothing_is_not_held_up_by_one_that_runs_more() -> None:
    greedy = [demand("greedy")] * 4
    assert taken(greedy, *[demand("modest")] * 4) == [0, 1]
    each_its_own = [demand(caller) for caller in "bcde"]
    assert taken(each_its_own, demand("modest")) == []


@pytest.mark.parametrize("caller", ["a", "another"])
def test_a_short_job_is_not_held_up_by_long_ones(caller: str) -> None:
    longs = [demand("a")] * 4
    assert taken(longs, demand(caller, num_steps=25)) == [0]
    one_of_each = [demand(c) for c in "abcd"]
    assert taken(one_of_each, demand(caller, num_steps=25)) == [0]
    assert taken(one_of_each, demand("another", num_steps=26)) == []


def test_short_jobs_are_no_more_than_fill_a_step() -> None:
    assert taken([demand()] * 4, *[demand(num_steps=8)] * 8) == [0, 1, 2, 3]


def test_what_is_due_starts_whatever_the_steps_hold_while_fewer_run_than_may() -> None:
    room = StepRoom([demand(priority=HIGH)] * 15, 16, BUDGET)
    assert not room.take(demand(priority=LOW))
    assert room.take(demand(priority=LOW), is_due=True)
    assert not room.take(demand(priority=LOW), is_due=True)


def test_a_job_that_only_the_number_of_jobs_holds_back_asks_for_no_longer_steps() -> None:
    room = StepRoom([demand()], 1, BUDGET)
    assert not room.take(demand())
    assert not room.take(demand(num_images=8))
    assert room.refused_sizes == set()


def test_a_size_that_has_not_run_has_the_budget_of_the_size_most_like_it() -> None:
    limit = StepLimit(2 * BUDGET)
    room = StepRoom([], 16, limit.pixels, limit.by_size)
    assert [room.take(demand(num_images=2)) for _ in range(4)] == [True, False, False, False]
    limit.begin({SampleSize(512, 512): 4 * IMAGE, SampleSize(2048, 2048): 8 * IMAGE})
    room = StepRoom([], 16, limit.pixels, limit.by_size)
    assert [room.take(demand(side=768)) for _ in range(9)].count(True) == 4 * IMAGE // 768**2


def test_a_size_may_have_a_budget_of_its_own() -> None:
    room = StepRoom([], 16, BUDGET, {SampleSize(1024, 1024): IMAGE, SampleSize(512, 512): IMAGE})
    waiting = [demand(side=512), demand(side=512), demand(), demand(), demand(side=768)]
    assert [room.take(waits) for waits in waiting] == [True, True, True, False, False]
    assert room.refused_sizes == {SampleSize(1024, 1024), SampleSize(768, 768)}


DEMANDS = st.builds(
    demand,
    st.sampled_from("ab"),
    st.sampled_from([NORMAL, HIGH]),
    st.sampled_from([1, 1, 5]),
    st.integers(1, 50),
    st.sampled_from([512, 768]),
)


@given(running=st.lists(DEMANDS, max_size=8), waiting=st.lists(DEMANDS, min_size=1, max_size=4))
def test_a_job_starts_if_those_before_it_leave_room(
    running: list[StepDemand], waiting: list[StepDemand]
) -> None:
    room = StepRoom(running, 100, BUDGET)
    served = list(running)
    for waits in waiting:
        assert room.take(waits) == is_served_soon(served, waits)
        served.append(waits)


def is_served_soon(served: list[StepDemand], waits: StepDemand) -> bool:
    """What `StepRoom` promises, by exact shares and without a sum that is kept."""
    own = [other for other in served if is_of_line(other, waits)]
    place = sum(not is_short_beside(waits, other) for other in own)
    before: list[StepDemand] = []
    for number, other in enumerate(served):
        other_place = sum(is_of_line(earlier, other) for earlier in served[:number])
        is_as_far = other_place == place and not is_short_beside(waits, other)
        is_alike = other.priority == waits.priority
        if other.priority > waits.priority or (is_alike and (other_place < place or is_as_far)):
            before.append(other)
    pixels = sum(other.step_pixels for other in before if other.size == waits.size)
    fits = not pixels or pixels + waits.step_pixels <= BUDGET
    return fits and sum(Fraction(other.step_pixels, BUDGET) for other in before) < 1


def is_short_beside(one: StepDemand, other: StepDemand) -> bool:
    return one.work <= SHORT * other.work


def is_of_line(one: StepDemand, other: StepDemand) -> bool:
    return (one.caller, one.priority) == (other.caller, other.priority)
