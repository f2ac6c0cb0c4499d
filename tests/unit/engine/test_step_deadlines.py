"""Steps go first to what turns would make late, while it can still end before its deadline."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from hidream_grpc.engine.requests import Priority
from hidream_grpc.engine.running_request import RunningRequest
from hidream_grpc.engine.scheduler import next_forward, note_forward
from hidream_grpc.engine.step_order import MAX_TURNS_WAITED, URGENT_FACTOR, step_order
from tests.support.running_requests import PARAMETERS, running_request

PIXELS = 64 * 64
MEAN_STEPS = 20
MAX_RUNNING = 8
LOAD = 0.8
NUM_JOBS = 300


@dataclass(frozen=True)
class Arrival:
    """A job that comes at a moment, whose caller waits until another one; a step takes a second."""

    time: float
    num_steps: int
    deadline: float
    caller: str


def arrivals(seed: int) -> list[Arrival]:
    """Jobs that come at random, and must end in 1.5 to 4 times what they would take alone."""
    choice = random.Random(seed)
    seconds = 0.0
    jobs = []
    for _ in range(NUM_JOBS):
        num_steps = choice.choice([MEAN_STEPS // 2, MEAN_STEPS, MEAN_STEPS * 3 // 2])
        jobs.append(
            Arrival(seconds, num_steps, seconds + num_steps * choice.uniform(1.5, 4.0), choice.choice("abcd"))
        )
        seconds += choice.expovariate(LOAD / MEAN_STEPS)
    return jobs


def num_met(jobs: list[Arrival], *, are_told: bool) -> int:
    """Count the jobs that end in time, with and without the engine knowing the deadlines.

    A job whose deadline has passed is stopped, or not started, as the service does.
    """
    coming, waiting, now, met = list(jobs), list[Arrival](), 0.0, 0
    running: dict[str, RunningRequest] = {}
    deadlines: dict[str, float] = {}
    while coming or waiting or running:
        if not (waiting or running):
            now = max(now, coming[0].time)
        while coming and coming[0].time <= now:
            waiting.append(coming.pop(0))
        waiting = [job for job in waiting if job.deadline > now]
        running = {name: request for name, request in running.items() if deadlines[name] > now}
        while waiting and len(running) < MAX_RUNNING:
            job = waiting.pop(0)
            name = str(len(deadlines))
            parameters = replace(PARAMETERS, num_inference_steps=job.num_steps)
            deadline = job.deadline if are_told else None
            running[name] = running_request(name, parameters, caller=job.caller, deadline=deadline)
            deadlines[name] = job.deadline
        stepped = next_forward(running, PIXELS, now=now).claim_ids
        note_forward(running, stepped, step_seconds=1.0)
        now += 1.0
        for name in stepped:
            if running[name].is_denoised:
                met += now <= deadlines[name]
                del running[name]
    return met


@pytest.mark.parametrize("seed", range(3))
def test_at_a_load_of_80_percent_a_fifth_more_deadlines_are_met_than_by_turns_alone(seed: int) -> None:
    jobs = arrivals(seed)
    assert num_met(jobs, are_told=True) >= 1.2 * num_met(jobs, are_told=False)


def test_a_request_that_turns_would_make_late_goes_first() -> None:
    patient = running_request("patient", caller="a")
    late = running_request("late", caller="b", deadline=20.0)
    for request in (patient, late):
        request.take_step(1.0)
    patient.turns_waited = 5
    num_left = PARAMETERS.num_inference_steps - 1
    early_enough = 20.0 - URGENT_FACTOR * num_left
    assert step_order([patient, late], early_enough) == [patient, late]
    assert step_order([patient, late], early_enough + 0.1) == [late, patient]


def test_a_deadline_that_cannot_be_met_any_more_gives_no_precedence() -> None:
    patient = running_request("patient", caller="a")
    late = running_request("late", caller="b", deadline=20.0)
    for request in (patient, late):
        request.take_step(1.0)
    patient.turns_waited = 5
    num_left = PARAMETERS.num_inference_steps - 1
    assert step_order([patient, late], 20.0 - num_left)[0] is late
    assert step_order([patient, late], 20.1 - num_left)[0] is patient


def test_a_request_without_a_step_is_judged_by_the_steps_of_others() -> None:
    patient, new = running_request("patient", caller="a"), running_request("new", caller="b", deadline=20.0)
    patient.take_step(1.0)
    patient.turns_waited = 5
    assert step_order([patient, new], now=0.0)[0] is new
    assert step_order([patient, new], now=15.0)[0] is patient


def test_of_urgent_requests_the_earliest_deadline_goes_first_and_priority_before_it() -> None:
    first = running_request("first", deadline=10.0)
    second = running_request("second", deadline=12.0)
    high = running_request("high", priority=Priority.HIGH)
    for request in (second, first, high):
        request.take_step(1.0)
    assert step_order([second, first, high], now=1.0) == [high, first, second]


def test_a_caller_whose_deadlines_are_always_urgent_does_not_stop_the_others() -> None:
    running = {"patient": running_request("patient", replace(PARAMETERS, num_inference_steps=1000))}
    running["patient"].take_step(1.0)
    num_waited = 0
    for now in range(10 * MAX_TURNS_WAITED):
        running["urgent"] = running_request("urgent", caller="pushy", deadline=now + 10.0)
        (stepped,) = next_forward(running, PIXELS, now=float(now)).claim_ids
        note_forward(running, (stepped,), step_seconds=1.0)
        num_waited = 0 if stepped == "patient" else num_waited + 1
        assert num_waited <= MAX_TURNS_WAITED
