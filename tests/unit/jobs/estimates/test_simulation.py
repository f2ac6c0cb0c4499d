"""Estimates against what then happens, on the engine's own scheduler in made-up time."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.requests import StepReport
from hidream_grpc.jobs.estimates.durations import MeasuredDurations
from hidream_grpc.jobs.estimates.simulation import (
    COARSENESS,
    MAX_SIMULATED_JOBS,
    EngineCapacity,
    Estimates,
    JobWork,
    Simulation,
    estimate_jobs,
)
from tests.unit.jobs.simulated_engine import SimulatedEngine, Times, median_error, work_of

MAX_MEDIAN_ERROR = 0.25
SQUARE = 512 * 512
NUM_JOBS = 40
# Loads that are all there from the start, and one that goes on arriving faster than it is served.
LOADS: dict[str, tuple[EngineCapacity, Callable[[random.Random, int], tuple[float, JobWork]]]] = {
    "one size": (EngineCapacity(4, 2 * SQUARE, 1), lambda _, n: (0.0, work_of(n))),
    "two sizes from two callers": (
        EngineCapacity(4, 8 * SQUARE, 2),
        lambda _, n: (0.0, work_of(n, width=(512, 768)[n % 2], caller=f"caller {n % 2}")),
    ),
    "forwards that are too small for all": (
        EngineCapacity(5, 2 * SQUARE, 2),
        lambda _, n: (0.0, work_of(n, width=(512, 768)[n % 2])),
    ),
    "every shape at once": (
        EngineCapacity(6, 16 * SQUARE, 4),
        lambda r, n: (
            0.0,
            work_of(n, r.choice([512, 768, 1024]), r.choice([10, 28, 50]), r.choice([1, 2, 4])),
        ),
    ),
    "arrivals": (EngineCapacity(4, 8 * SQUARE, 1), lambda r, n: (1.5 * n, work_of(n, r.choice([512, 768])))),
}


def noisy_times(noise: random.Random) -> Times:
    """Times of a device where a step has a fixed part, on a host that is never twice the same."""
    return Times(
        step_seconds=lambda w, h, s: (0.02 + 0.3 * w * h * s / 1024**2) * noise.lognormvariate(0.0, 0.2),
        image_seconds=lambda w, h: 1.5 * w * h / 1024**2 * noise.lognormvariate(0.0, 0.2),
        encode_seconds=0.1,
        between_steps=0.004,
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
@pytest.mark.parametrize("load", LOADS)
def test_the_median_error_on_a_steady_load_is_under_a_quarter(load: str, seed: int) -> None:
    capacity, make = LOADS[load]
    engine = SimulatedEngine(noisy_times(random.Random(seed)), capacity, rounds_per_estimate=5)
    choice = random.Random(seed)
    engine.run([make(choice, number) for number in range(NUM_JOBS)])
    assert median_error(engine.wait_errors) < MAX_MEDIAN_ERROR
    assert median_error(engine.rest_errors) < MAX_MEDIAN_ERROR


def jobs_of(max_jobs: int, max_steps: int) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    """Lists of jobs: the side of the image, the steps and the number of images of each."""
    job = st.tuples(st.sampled_from([256, 512, 1024]), st.integers(1, max_steps), st.integers(1, 3))
    return st.lists(job, min_size=1, max_size=max_jobs)


@given(jobs=jobs_of(max_jobs=6, max_steps=12), max_running=st.integers(1, 6))
def test_without_noise_jobs_start_and_end_within_two_turns_of_their_estimates(
    jobs: list[tuple[int, int, int]], max_running: int
) -> None:
    assert_starts_and_ends_within_two_turns_of_their_estimates(jobs, max_running)


@pytest.mark.long
@given(jobs=jobs_of(max_jobs=12, max_steps=40), max_running=st.integers(1, 12))
def test_without_noise_many_long_jobs_start_and_end_within_two_turns_of_their_estimates(
    jobs: list[tuple[int, int, int]], max_running: int
) -> None:
    assert_starts_and_ends_within_two_turns_of_their_estimates(jobs, max_running)


def assert_starts_and_ends_within_two_turns_of_their_estimates(
    jobs: list[tuple[int, int, int]], max_running: int
) -> None:
    # In proportion to the work, so that what is not measured yet is scaled exactly; a rank for each image.
    times = Times(step_seconds=lambda w, h, s: w * h * s / SQUARE)
    engine = SimulatedEngine(times, EngineCapacity(max_running, 2**40, 36))
    engine.durations.note_step(StepReport(1.0, 512, 512, 1))
    # They cost nothing, but each takes a round.
    engine.durations.note_image(512, 512, 0.0)
    engine.waiting = [work_of(n, width, steps, images) for n, (width, steps, images) in enumerate(jobs)]
    starts = engine.estimate().starts
    engine.run([])
    turn_seconds = sum(width**2 * images / SQUARE for width, _, images in jobs)
    assert starts.keys() == {rest.job_id for rest in engine.rests} == engine.ends.keys()
    for job_id, seconds in starts.items():
        assert abs(seconds - engine.starts[job_id]) <= 2 * turn_seconds
    for rest in engine.rests:
        assert abs(rest.at_seconds + rest.in_seconds - engine.ends[rest.job_id]) <= 2 * turn_seconds


@given(jobs=jobs_of(max_jobs=12, max_steps=40), max_running=st.integers(1, 4), num_running=st.integers(0, 4))
def test_every_job_has_an_estimate_and_none_starts_before_a_shorter_one_in_front_of_it(
    jobs: list[tuple[int, int, int]], max_running: int, num_running: int
) -> None:
    work = [work_of(n, width, steps, images) for n, (width, steps, images) in enumerate(jobs)]
    running, waiting = work[: min(num_running, max_running)], work[min(num_running, max_running) :]
    durations = measured()
    capacity = EngineCapacity(max_running, 4 * SQUARE, 2)
    estimates = estimate_jobs(durations, capacity, running, waiting)
    starts, ends = estimates.starts, estimates.ends
    assert list(starts) == [w.job_id for w in waiting]
    for front, behind in itertools.combinations(waiting, 2):
        if starts[front.job_id] > starts[behind.job_id]:
            # Of two with equal work one of another size may fit before.
            assert front.demand.work >= behind.demand.work
    assert set(ends) == {w.job_id for w in work}
    assert all(starts[w.job_id] < ends[w.job_id] for w in waiting)
    assert all(seconds >= 0 for seconds in (*starts.values(), *ends.values()))


def test_nothing_is_estimated_while_no_step_was_measured() -> None:
    capacity = EngineCapacity(1, SQUARE, 1)
    durations = MeasuredDurations()
    durations.note_image(512, 512, 1.0)
    assert estimate_jobs(durations, capacity, [work_of(0)], [work_of(1)]) == Estimates({}, {})


def test_a_job_with_all_its_steps_behind_it_still_has_its_images_in_front() -> None:
    running = [work_of(0, steps=20, step=20, images=3)]
    ends = estimate_jobs(measured(), EngineCapacity(1, SQUARE, 1), running, []).ends
    assert ends["job 0"] == pytest.approx(3 * 0.5)


def test_images_are_shared_by_the_ranks() -> None:
    capacity = EngineCapacity(1, SQUARE, num_ranks=3)
    ends = estimate_jobs(measured(), capacity, [work_of(0, steps=20, step=20, images=3)], []).ends
    assert ends["job 0"] == pytest.approx(0.5)


def test_a_running_job_counts_those_that_will_take_the_place_of_others() -> None:
    capacity = EngineCapacity(2, SQUARE, 1)
    running = [work_of(0, steps=1), work_of(1, steps=50)]
    alone = estimate_jobs(measured(), capacity, running, []).ends["job 1"]
    beside_a_newcomer = estimate_jobs(measured(), capacity, running, [work_of(2, steps=20)]).ends["job 1"]
    assert beside_a_newcomer - alone == pytest.approx(20 * 1.0 + 0.5, rel=0.05)


def test_a_forward_with_room_left_is_filled_up_with_those_that_had_their_turn() -> None:
    engine = SimulatedEngine(Times(lambda w, h, s: w * h * s / SQUARE), EngineCapacity(3, 2 * SQUARE, 1))
    engine.durations.note_step(StepReport(1.0, 512, 512, 1))
    # As after a step has lost room.
    running = [work_of(number, steps=10) for number in range(3)]
    engine.running = {work.job_id: work.running_request() for work in running}
    ends = estimate_jobs(engine.durations, engine.capacity, running, []).ends
    engine.run([])
    assert ends == pytest.approx(engine.ends)
    # Thirty steps, two in each forward of two seconds.
    assert max(ends.values()) == pytest.approx(15 * 2.0)


def test_a_caller_that_has_enough_running_is_passed_over() -> None:
    capacity = EngineCapacity(2, 2 * SQUARE, 1, max_running_jobs_of_caller=1)
    waiting = [work_of(1, caller="greedy"), work_of(2, caller="modest")]
    starts = estimate_jobs(measured(), capacity, [work_of(0, caller="greedy")], waiting).starts
    assert starts["job 2"] == 0.0
    assert starts["job 1"] > 0.0


def test_a_job_that_finds_room_waits_for_nothing() -> None:
    starts = estimate_jobs(measured(), EngineCapacity(2, 2 * SQUARE, 1), [work_of(0)], [work_of(1)]).starts
    assert starts == {"job 1": 0.0}


def test_those_far_behind_follow_at_the_pace_of_those_in_front() -> None:
    waiting = [work_of(n, steps=10) for n in range(4 * MAX_SIMULATED_JOBS)]
    estimates = estimate_jobs(measured(), EngineCapacity(1, SQUARE, 1), [], waiting)
    last = waiting[-1].job_id
    assert estimates.starts[last] == pytest.approx((len(waiting) - 1) * (10 * 1.0 + 0.5), rel=0.01)
    assert estimates.ends[last] == pytest.approx(len(waiting) * (10 * 1.0 + 0.5), rel=0.01)


@pytest.mark.parametrize("max_step_pixels", [SQUARE, 8 * SQUARE])
def test_the_cost_of_a_long_queue_is_bounded(monkeypatch: pytest.MonkeyPatch, max_step_pixels: int) -> None:
    num_rounds = 0

    def counting(self: Simulation) -> None:
        nonlocal num_rounds
        num_rounds += 1
        run_round(self)

    run_round = Simulation.run_round
    monkeypatch.setattr(Simulation, "run_round", counting)
    work = [work_of(n, width=(512, 768, 1024)[n % 3], steps=50) for n in range(500)]
    estimate_jobs(measured(), EngineCapacity(16, max_step_pixels, 2), work[:16], work[16:])
    num_jobs = 16 + MAX_SIMULATED_JOBS
    coarseness = COARSENESS * num_jobs
    # One in which all that step have fewer steps left is repeated less often.
    assert num_rounds <= (1 + math.log1p(coarseness * 50 * num_jobs)) / coarseness + num_jobs
    assert num_rounds <= 120


def measured() -> MeasuredDurations:
    """A second a step of 512 × 512, in proportion to pixels and samples; half a second an image."""
    durations = MeasuredDurations()
    durations.note_step(StepReport(1.0, 512, 512, 1))
    durations.note_image(512, 512, 0.5)
    return durations
