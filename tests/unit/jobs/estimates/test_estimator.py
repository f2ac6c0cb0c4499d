"""What a server tells its callers about the time to come, from what its engine reported."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from hidream_grpc.engine.requests import (
    ImageFinished,
    Priority,
    PromptsEncoded,
    RequestFinished,
    RequestRestarted,
    StepFinished,
    StepReport,
)
from hidream_grpc.jobs.estimates.estimator import KEPT_SECONDS, JobEstimator
from hidream_grpc.jobs.estimates.simulation import MAX_SIMULATED_JOBS, EngineCapacity, JobWork
from hidream_grpc.jobs.job import Job, StoredSnapshot
from hidream_grpc.jobs.store.order import TURNS_PER_OLDEST
from tests.unit.jobs.service_bench import submission

STEPS = 3


@dataclass
class Clock:
    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def estimator(clock: Clock) -> JobEstimator:
    """One job at a time; a step takes 1 s, an image 0.5 s, prompts 0.25 s."""
    estimator = JobEstimator(lambda: EngineCapacity(1, 2**40, num_ranks=1), clock)
    estimator.observe_step(StepReport(1.0, 64, 64, 2))
    estimator.note_taken(job("measured"))
    estimator.observe("measured", PromptsEncoded(0.25))
    estimator.observe("measured", ImageFinished(0, b"", 0.5))
    estimator.observe("measured", RequestFinished())
    return estimator


def job(job_id: str) -> Job:
    return Job(job_id, submission(), create_time=0.0)


def work(job_id: str) -> JobWork:
    return JobWork.of(job(job_id))


def test_nothing_is_said_before_anything_was_measured(clock: Clock) -> None:
    estimator = JobEstimator(lambda: EngineCapacity(1, 2**40, num_ranks=1), clock)
    estimator.note_taken(job("a"))
    estimator.note_waiting([work("b")])
    assert estimator.remaining_seconds("a") is None
    assert estimator.wait_seconds("b") is None


def test_a_running_job_has_its_steps_and_its_image_in_front_of_it(estimator: JobEstimator) -> None:
    estimator.note_taken(job("a"))
    estimator.observe("a", StepFinished(1, 1.0))
    assert estimator.remaining_seconds("a") == pytest.approx(2 * 1.0 + 0.5)


def test_jobs_wait_for_those_in_front_of_them(estimator: JobEstimator) -> None:
    estimator.note_taken(job("a"))
    estimator.observe("a", StepFinished(2, 1.0))
    estimator.note_waiting([work("b"), work("c")])
    assert estimator.wait_seconds("b") == pytest.approx(1.5)
    assert estimator.wait_seconds("c") == pytest.approx(1.5 + 0.25 + 3 * 1.0 + 0.5)


def test_a_job_that_leaves_shortens_the_wait_of_those_behind_at_once(estimator: JobEstimator) -> None:
    estimator.note_taken(job("a"))
    estimator.note_waiting([work("b")])
    assert estimator.wait_seconds("b") == pytest.approx(3.5)
    estimator.note_gone("a")
    assert estimator.wait_seconds("b") == 0.0


def test_a_caller_that_leaves_the_queue_shortens_the_wait_of_those_behind_at_once(
    estimator: JobEstimator,
) -> None:
    estimator.note_taken(job("a"))
    estimator.note_waiting([work("b"), work("c")])
    far = estimator.wait_seconds("c")
    estimator.note_waiting([work("c")])
    near = estimator.wait_seconds("c")
    assert far is not None and near is not None and near < far
    assert estimator.wait_seconds("b") is None


def test_time_that_passes_between_two_looks_is_taken_off(estimator: JobEstimator, clock: Clock) -> None:
    estimator.note_taken(job("a"))
    assert estimator.remaining_seconds("a") == pytest.approx(3.5)
    clock.seconds += KEPT_SECONDS / 2
    assert estimator.remaining_seconds("a") == pytest.approx(3.5 - KEPT_SECONDS / 2)


def test_a_look_after_a_while_sees_what_was_done_meanwhile(estimator: JobEstimator, clock: Clock) -> None:
    estimator.note_taken(job("a"))
    assert estimator.remaining_seconds("a") == pytest.approx(3.5)
    # Slower than foreseen: one step took the time of three.
    clock.seconds += 3.0
    estimator.note_taken(job("a"))
    estimator.observe("a", StepFinished(1, 1.0))
    assert estimator.remaining_seconds("a") == pytest.approx(2.5)


def test_what_comes_later_than_foreseen_is_due_now(estimator: JobEstimator, clock: Clock) -> None:
    estimator.note_taken(job("a"))
    estimator.observe("a", StepFinished(STEPS, 1.0))
    estimator.observe("a", ImageFinished(0, b"", 0.5))
    assert estimator.remaining_seconds("a") == 0.0
    clock.seconds += KEPT_SECONDS / 2
    assert estimator.remaining_seconds("a") == 0.0


def test_a_job_that_lost_its_ranks_has_its_steps_in_front_of_it_again(estimator: JobEstimator) -> None:
    estimator.note_taken(job("a"))
    estimator.observe("a", StepFinished(2, 1.0))
    assert estimator.remaining_seconds("a") == pytest.approx(1.5)
    estimator.observe("a", RequestRestarted(2, "a rank died", resumed_from_step=1))
    assert estimator.remaining_seconds("a") == pytest.approx(2.5)


def test_a_job_that_goes_on_from_its_snapshot_has_the_rest_in_front_of_it(estimator: JobEstimator) -> None:
    estimator.note_taken(replace(job("a"), snapshot=StoredSnapshot(1, 2)))
    assert estimator.remaining_seconds("a") == pytest.approx(1.5)


def test_a_place_in_the_queue_is_free_when_the_first_job_starts(estimator: JobEstimator) -> None:
    assert estimator.next_start_seconds is None
    estimator.note_taken(job("a"))
    estimator.note_waiting([work("b"), work("c")])
    assert estimator.next_start_seconds == pytest.approx(3.5)


def test_a_job_that_comes_last_is_estimated_from_the_one_before_it_as_with_all_others(
    estimator: JobEstimator,
) -> None:
    estimator.note_taken(job("a"))
    waiting = [work(str(number)) for number in range(MAX_SIMULATED_JOBS + 10)]
    estimator.note_waiting(waiting)
    assert estimator.wait_seconds("0") == pytest.approx(3.5)
    for number in range(len(waiting), len(waiting) + 3):
        estimator.note_newest(work(str(number)), number)
    estimated = [estimator.wait_seconds("75"), estimator.remaining_seconds("76")]
    estimator.note_waiting([work(str(number)) for number in range(len(waiting) + 3)])
    assert estimated == pytest.approx([estimator.wait_seconds("75"), estimator.remaining_seconds("76")])


def test_a_job_that_later_ones_overtake_is_told_how_long_they_may_go_on(
    estimator: JobEstimator, clock: Clock
) -> None:
    low = Job("low", submission(priority=Priority.LOW), create_time=1.0)
    estimator.note_waiting([JobWork.of(low)])
    own_seconds = 0.25 + STEPS * 1.0 + 0.5
    assert estimator.wait_seconds("low") == 0.0
    assert estimator.remaining_seconds("low") == pytest.approx(own_seconds)
    # The first one was accepted earlier: it is in its turn.
    for number, create_time in enumerate([0.5, 2.0, 3.0, 4.0]):
        clock.seconds += 4.0
        estimator.note_taken(Job(f"normal {number}", submission(), create_time=create_time))
        estimator.observe(f"normal {number}", RequestFinished())
    to_come = (TURNS_PER_OLDEST - 3) * 4.0
    assert estimator.wait_seconds("low") == pytest.approx(to_come)
    assert estimator.remaining_seconds("low") == pytest.approx(to_come + own_seconds)
    estimator.note_taken(low)
    assert estimator.remaining_seconds("low") == pytest.approx(STEPS * 1.0 + 0.5)
