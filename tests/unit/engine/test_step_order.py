"""Steps go by priority, callers take turns, and no request waits for ever."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import next_forward, note_forward
from hidream_grpc.engine.step_order import MAX_TURNS_DEFERRED, MAX_TURNS_WAITED
from tests.support.running_requests import PARAMETERS, running_request

PIXELS = 64 * 64
MAX_RUNNING = 6


class Running(dict[str, RunningRequest]):
    """Requests that run, each of one sample, and what they have done."""

    def start(
        self,
        claim_id: str,
        caller: str = "",
        priority: Priority = Priority.NORMAL,
        side: int = 64,
        num_steps: int = 1000,
    ) -> None:
        parameters = replace(PARAMETERS, width=side, height=side, num_inference_steps=num_steps)
        self[claim_id] = running_request(claim_id, parameters, caller=caller, priority=priority)

    def step(self, num_requests: int = 1) -> tuple[str, ...]:
        """One forward with room for so many small requests; those that have ended leave."""
        claim_ids = next_forward(self, num_requests * PIXELS).claim_ids
        note_forward(self, claim_ids, step_seconds=1.0)
        for claim_id in claim_ids:
            if self[claim_id].is_denoised:
                del self[claim_id]
        return claim_ids


def test_a_caller_with_one_request_steps_as_often_as_one_with_five() -> None:
    running = Running()
    for number in range(5):
        running.start(f"greedy {number}", caller="greedy")
    running.start("modest", caller="modest")
    steps = Counter(claim_id for _ in range(20) for claim_id in running.step())
    assert steps["modest"] == 10
    assert {steps[f"greedy {number}"] for number in range(5)} == {2}


def test_a_forward_has_a_request_of_each_caller_before_a_second_one_of_any() -> None:
    running = Running()
    for caller in "aaab":
        running.start(f"{caller}{len(running)}", caller=caller)
    assert all("b3" in running.step(2) for _ in range(6))
    assert {running[claim_id].step for claim_id in ("a0", "a1", "a2")} == {2}


def test_callers_whose_sizes_differ_take_turns_in_steps() -> None:
    running = Running()
    for number in range(3):
        running.start(f"small {number}", caller="a")
    running.start("large", caller="b", side=128)
    assert [claim_ids == ("large",) for claim_ids in (running.step(8) for _ in range(6))] == [False, True] * 3


@pytest.mark.parametrize("others", list(Priority))
@pytest.mark.parametrize("side", [64, 128])
def test_a_high_request_is_in_the_next_forward_whatever_else_has_waited(others: Priority, side: int) -> None:
    running = Running()
    for number in range(MAX_TURNS_WAITED + 4):
        running.start(f"old {number}", caller=f"caller {number}", priority=others)
    running.start("low", priority=Priority.LOW)
    for _ in range(2 * MAX_TURNS_WAITED - 1):
        running.step()
    running.start("urgent", priority=Priority.HIGH, side=side)
    assert running.step() == ("urgent",)


def test_a_lower_priority_steps_beside_a_higher_one_every_seventeenth_time() -> None:
    running = Running()
    running.start("normal")
    running.start("low", priority=Priority.LOW)
    steps = [running.step()[0] for _ in range(5 * (MAX_TURNS_WAITED + 1))]
    assert Counter(steps) == {"normal": 5 * MAX_TURNS_WAITED, "low": 5}


@pytest.mark.parametrize("num_others", [15, 30])
@pytest.mark.parametrize("others", [Priority.LOW, Priority.NORMAL])
def test_many_requests_that_wait_take_one_step_in_seventeen_from_a_higher_priority(
    others: Priority, num_others: int
) -> None:
    running = Running()
    for number in range(num_others):
        running.start(f"other {number}", caller=f"caller {number}", priority=others)
    running.start("high", priority=Priority.HIGH)
    steps = Counter(claim_id for _ in range(10 * (MAX_TURNS_WAITED + 1)) for claim_id in running.step())
    assert steps["high"] == 10 * MAX_TURNS_WAITED


@pytest.mark.parametrize("num_others", [15, 30])
def test_many_requests_of_a_caller_that_wait_take_one_step_in_seventeen_from_another_caller(
    num_others: int,
) -> None:
    running = Running()
    for number in range(num_others):
        running.start(f"greedy {number}", caller="greedy")
    running.start("modest", caller="modest")
    steps = Counter(claim_id for _ in range(10 * (MAX_TURNS_WAITED + 1)) for claim_id in running.step())
    assert steps["modest"] >= 10 * MAX_TURNS_WAITED // 2


def test_a_caller_that_goes_on_starting_requests_keeps_its_turn() -> None:
    running = Running()
    for caller in "abc":
        running.start(caller, caller=caller)
    steps: Counter[str] = Counter()
    for number in range(30):
        running.start(f"a{number}", caller="a")
        steps.update(claim_id[0] for claim_id in running.step())
    # But for the one step of the longest waiting request.
    assert all(abs(steps[caller] - 10) <= 1 for caller in "abc")


def test_a_caller_whose_request_has_just_ended_has_had_its_turn() -> None:
    running = Running()
    running.start("a", caller="a")
    running.start("b", caller="b")
    steps: Counter[str] = Counter()
    for number in range(30):
        running.start(f"a{number}", caller="a", num_steps=1)
        steps.update(claim_id[0] for claim_id in running.step())
    assert steps == {"a": 15, "b": 15}


def test_first_steps_of_high_priority_pass_over_a_request_for_a_bounded_number_of_forwards() -> None:
    running = Running()
    running.start("low", priority=Priority.LOW)
    low_steps = []
    for number in range(5 * (MAX_TURNS_DEFERRED + 1)):
        running.start(f"high {number}", priority=Priority.HIGH, num_steps=1)
        low_steps += [number] if running.step() == ("low",) else []
    assert low_steps == [MAX_TURNS_DEFERRED + n * (MAX_TURNS_DEFERRED + 1) for n in range(5)]


@dataclass(frozen=True)
class Arrival:
    caller: str
    priority: Priority
    side: int
    num_steps: int
    after_forwards: int


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        st.sampled_from("ab"),
        st.sampled_from(list(Priority)),
        st.sampled_from([64, 128]),
        st.integers(1, 40),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=30,
)


@given(ARRIVALS, st.integers(1, 6))
def test_no_request_waits_for_more_than_a_bounded_number_of_forwards(
    arrivals: list[Arrival], num_requests: int
) -> None:
    running = Running()
    waits: dict[str, int] = {}
    # Of these, those that a first step of HIGH priority led.
    passed: dict[str, int] = {}
    coming = list(enumerate(arrivals))
    pause = 0
    while coming or running:
        while coming and len(running) < MAX_RUNNING and pause >= coming[0][1].after_forwards:
            number, arrival = coming.pop(0)
            running.start(str(number), arrival.caller, arrival.priority, arrival.side, arrival.num_steps)
            pause = 0
        before = dict(running)
        first_of_high = [
            request
            for request in running.values()
            if request.request.priority is Priority.HIGH and not request.step
        ]
        claim_ids = running.step(num_requests)
        # The ranks are never idle while a request has steps to take.
        assert claim_ids or not before
        pause += 1
        leader = before.get(claim_ids[0]) if claim_ids else None
        is_first_of_high = leader in first_of_high
        for claim_id, request in before.items():
            if claim_id in claim_ids:
                waits[claim_id] = passed[claim_id] = 0
                continue
            waits[claim_id] = waits.get(claim_id, 0) + 1
            passed[claim_id] = passed.get(claim_id, 0) + is_first_of_high
            num_others = MAX_RUNNING - 1
            assert waits[claim_id] - passed[claim_id] <= (num_others + 1) * (MAX_TURNS_WAITED + 1)
            assert waits[claim_id] <= (num_others + 1) * (MAX_TURNS_DEFERRED + 1)
            if request in first_of_high:
                assert waits[claim_id] <= MAX_RUNNING
