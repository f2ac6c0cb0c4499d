"""What cannot end before its deadline is refused at once, by what was measured and never by a guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import pytest

from hidream_grpc.engine.requests import Priority, RequestFailed, RequestFinished, StepReport
from hidream_grpc.errors import (
    DeadlineTooShortError,
    JobInternalError,
    TooBusyForDeadlineError,
)
from hidream_grpc.jobs.deadlines import deadline_refusal
from hidream_grpc.jobs.estimates.accuracy import MIN_OUTCOMES, NUM_OUTCOMES, EstimateAccuracy
from hidream_grpc.jobs.estimates.durations import (
    MAX_AGE_SECONDS,
    MIN_RECENT_STEPS,
    NUM_KEPT,
    MeasuredDurations,
)
from hidream_grpc.jobs.estimates.estimator import EarliestEnd, JobEstimator
from hidream_grpc.jobs.estimates.simulation import (
    MAX_SIMULATED_JOBS,
    EngineCapacity,
    Estimates,
    JobWork,
    estimate_jobs,
)
from hidream_grpc.jobs.job import Job, StoredSnapshot, Submission
from hidream_grpc.jobs.replicas.membership import Membership
from tests.unit.jobs.service_bench import MODEL_IDENTITY, Bench, submission

ALONE_SECONDS = 3.0
"""Duration of a job with the engine to itself: three steps of a second."""


@dataclass
class Clock:
    seconds: float = 100.0

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Ranks:
    """The capacity of an engine that runs one job at a time."""

    layout: str = "cfg=2"

    def __call__(self) -> EngineCapacity:
        return EngineCapacity(1, 2**40, num_ranks=1, layout=self.layout)


def job(job_id: str, what: Submission | None = None) -> Job:
    return Job(job_id, what or submission(), create_time=0.0)


def measure(estimator: JobEstimator, step_seconds: float = 1.0, num_steps: int = MIN_RECENT_STEPS) -> None:
    for _ in range(num_steps):
        estimator.observe_step(StepReport(step_seconds, 64, 64, num_samples=2))


def end_jobs(estimator: JobEstimator, clock: Clock, share: float, num_jobs: int = MIN_OUTCOMES) -> None:
    """Have jobs end that take this share of their estimates."""
    for number in range(num_jobs):
        job_id = f"ended {number}"
        estimator.note_taken(job(job_id))
        estimated_seconds = estimator.remaining_seconds(job_id)
        assert estimated_seconds == pytest.approx(ALONE_SECONDS)
        clock.seconds += share * ALONE_SECONDS
        estimator.observe(job_id, RequestFinished())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


@pytest.fixture
def fresh(clock: Clock, ranks: Ranks) -> JobEstimator:
    """The estimates of an engine that runs one job at a time, before its first step."""
    return JobEstimator(ranks, clock)


@pytest.fixture
def estimator(fresh: JobEstimator, clock: Clock) -> JobEstimator:
    """The same, once jobs have ended just when it was estimated."""
    measure(fresh)
    end_jobs(fresh, clock, share=1.0)
    return fresh


def refusal(estimator: JobEstimator, deadline_seconds: float, **changes: object) -> object:
    asked = replace(submission(deadline_seconds=deadline_seconds), **changes)  # type: ignore[arg-type]
    return deadline_refusal((asked,), estimator)


def test_what_takes_longer_than_the_deadline_even_alone_is_told_so(estimator: JobEstimator) -> None:
    assert refusal(estimator, ALONE_SECONDS + 0.1) is None
    refused = refusal(estimator, ALONE_SECONDS - 0.1)
    assert isinstance(refused, DeadlineTooShortError)
    assert refused.earliest_seconds == pytest.approx(ALONE_SECONDS)


def test_what_would_be_late_behind_others_is_told_when_it_would_fit(
    estimator: JobEstimator, clock: Clock
) -> None:
    estimator.note_taken(job("runs"))
    estimator.note_waiting([JobWork.of(job("waits"))])
    deadline_seconds = ALONE_SECONDS + 1.0
    refused = refusal(estimator, deadline_seconds)
    assert isinstance(refused, TooBusyForDeadlineError)
    assert refused.retry_after_seconds == pytest.approx(3 * ALONE_SECONDS - deadline_seconds)
    # What is in front of it has become so much less.
    estimator.observe("runs", RequestFinished())
    estimator.note_waiting([])
    estimator.note_taken(job("waits"))
    clock.seconds += 2.0
    estimator.note_taken(replace_step(job("waits"), 2))
    assert refusal(estimator, deadline_seconds) is None


def replace_step(waiting: Job, step: int) -> Job:
    return replace(waiting, snapshot=StoredSnapshot(1, step))


def test_a_fresh_server_refuses_nothing_by_a_guess(fresh: JobEstimator, clock: Clock) -> None:
    assert refusal(fresh, 0.001) is None
    measure(fresh)
    end_jobs(fresh, clock, share=1.0, num_jobs=MIN_OUTCOMES - 1)
    assert refusal(fresh, 0.001) is None
    end_jobs(fresh, clock, share=1.0, num_jobs=1)
    assert refusal(fresh, 0.001) is not None


def test_a_size_that_was_never_measured_is_not_refused(estimator: JobEstimator) -> None:
    parameters = submission().parameters
    other = msgspec.structs.replace(parameters, width=128)
    assert refusal(estimator, 0.001, parameters=other) is None


def test_the_known_error_of_estimates_counts(fresh: JobEstimator, clock: Clock) -> None:
    measure(fresh)
    # Jobs end in half the time that was estimated.
    end_jobs(fresh, clock, share=0.5, num_jobs=NUM_OUTCOMES)
    assert refusal(fresh, 0.6 * ALONE_SECONDS) is None
    assert refusal(fresh, 0.4 * ALONE_SECONDS) is not None


def test_an_estimate_that_was_too_short_until_now_refuses_no_more_for_that() -> None:
    accuracy = EstimateAccuracy()
    for number in range(MIN_OUTCOMES):
        accuracy.expect(str(number), now=0.0, in_seconds=1.0)
        accuracy.note_end(str(number), now=5.0)
    assert accuracy.earliest_share == 1.0


def test_jobs_that_fail_or_are_stopped_say_nothing_of_estimates(fresh: JobEstimator, clock: Clock) -> None:
    measure(fresh)
    for number in range(2 * MIN_OUTCOMES):
        fresh.note_taken(job(str(number)))
        assert fresh.remaining_seconds(str(number)) is not None
        if number % 2:
            fresh.observe(str(number), RequestFailed(JobInternalError.new()))
        else:
            fresh.note_gone(str(number))
    assert refusal(fresh, 0.001) is None


def test_jobs_without_a_deadline_of_their_own_are_not_refused(estimator: JobEstimator) -> None:
    assert deadline_refusal((submission(),), estimator) is None
    assert refusal(estimator, 0.001, is_detached=True) is None


def test_a_high_request_and_one_of_a_caller_with_fewer_jobs_are_not_behind_all(
    estimator: JobEstimator,
) -> None:
    estimator.note_taken(replace_step(job("runs"), 2))
    estimator.note_waiting([JobWork.of(job(str(number))) for number in range(4)])
    deadline_seconds = 1.5 * ALONE_SECONDS
    assert refusal(estimator, deadline_seconds) is not None
    assert refusal(estimator, deadline_seconds, priority=Priority.HIGH) is None
    assert refusal(estimator, deadline_seconds, caller="another") is None


def test_what_was_measured_long_ago_refuses_nothing_until_it_is_measured_again(
    estimator: JobEstimator, clock: Clock
) -> None:
    measure(estimator, step_seconds=100.0, num_steps=NUM_KEPT)
    assert refusal(estimator, 10 * ALONE_SECONDS) is not None
    clock.seconds += MAX_AGE_SECONDS + 1.0
    assert refusal(estimator, 10 * ALONE_SECONDS) is None
    # The first job that is accepted then says how long it takes by now; what was before is forgotten.
    measure(estimator)
    assert refusal(estimator, ALONE_SECONDS + 0.1) is None
    assert refusal(estimator, ALONE_SECONDS - 0.1) is not None


def test_a_batch_of_another_size_says_nothing_of_one_that_was_measured_long_ago(
    estimator: JobEstimator, clock: Clock
) -> None:
    measure(estimator, step_seconds=100.0, num_steps=NUM_KEPT)
    clock.seconds += MAX_AGE_SECONDS + 1.0
    for _ in range(MIN_RECENT_STEPS):
        estimator.observe_step(StepReport(2.0, 64, 64, num_samples=4))
    assert refusal(estimator, ALONE_SECONDS + 0.1) is None


def test_what_was_measured_on_another_layout_refuses_nothing(
    estimator: JobEstimator, clock: Clock, ranks: Ranks
) -> None:
    measure(estimator, step_seconds=100.0, num_steps=NUM_KEPT)
    ranks.layout = "tp=1"
    assert refusal(estimator, 0.001) is None
    measure(estimator)
    assert refusal(estimator, 0.001) is None, "how wrong estimates are is not known on this layout"
    end_jobs(estimator, clock, share=1.0)
    assert refusal(estimator, ALONE_SECONDS + 0.1) is None
    assert refusal(estimator, ALONE_SECONDS - 0.1) is not None


def test_an_idle_engine_refuses_nothing_by_the_queue(estimator: JobEstimator) -> None:
    estimator.note_waiting([JobWork.of(job(str(number))) for number in range(50)])
    assert refusal(estimator, ALONE_SECONDS + 0.1) is None
    estimator.note_taken(job("runs"))
    assert isinstance(refusal(estimator, ALONE_SECONDS + 0.1), TooBusyForDeadlineError)


@pytest.mark.parametrize("num_waiting", [10, MAX_SIMULATED_JOBS, 2_000])
def test_a_refusal_simulates_none_of_the_others(
    estimator: JobEstimator, monkeypatch: pytest.MonkeyPatch, num_waiting: int
) -> None:
    estimator.note_taken(job("runs"))
    estimator.note_waiting([JobWork.of(job(str(number))) for number in range(num_waiting)])
    asked_seconds = ALONE_SECONDS + 1.0
    assert estimator.remaining_seconds("runs") is not None
    simulated: list[int] = []

    def count(
        durations: MeasuredDurations,
        capacity: EngineCapacity,
        running: Sequence[JobWork],
        waiting: Sequence[JobWork],
    ) -> Estimates:
        simulated.append(len(running) + len(waiting))
        return estimate_jobs(durations, capacity, running, waiting)

    monkeypatch.setattr("hidream_grpc.jobs.estimates.estimator.estimate_jobs", count)
    for _ in range(20):
        refused = refusal(estimator, asked_seconds)
        assert isinstance(refused, TooBusyForDeadlineError)
        assert refused.earliest_seconds == pytest.approx((num_waiting + 2) * ALONE_SECONDS)
    assert simulated == 20 * [1]


async def test_a_job_that_cannot_end_in_time_is_not_accepted_and_a_retry_still_finds_its_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = await bench.submit(submission("earlier"))
    monkeypatch.setattr(
        bench.estimator,
        "late_end",
        lambda _submission, deadline_seconds: EarliestEnd(9.0, 9.0) if deadline_seconds < 9.0 else None,
    )
    with pytest.raises(DeadlineTooShortError):
        await bench.submit(submission("new", deadline_seconds=8.0))
    await bench.submit(submission("patient", deadline_seconds=10.0))
    again = await bench.submit(submission("earlier", deadline_seconds=8.0))
    assert again.job_id == earlier.job_id
    assert bench.service.num_accepted == 2


async def test_what_another_server_may_run_is_not_refused_by_the_times_of_this_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.estimator, "late_end", lambda *_: EarliestEnd(9.0, 9.0))
    other = replace(MODEL_IDENTITY, fingerprint="ffff")
    await bench.submit(replace(submission("other", deadline_seconds=8.0), model=other))
    with pytest.raises(DeadlineTooShortError):
        await bench.submit(submission("own", deadline_seconds=8.0))
    monkeypatch.setattr(Membership, "shares_queue", True)
    await bench.submit(submission("own", deadline_seconds=8.0))


def test_requests_of_a_batch_that_are_alike_are_judged_once(
    estimator: JobEstimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Submission] = []

    def judge(asked: Submission, _: float) -> None:
        judged.append(asked)

    monkeypatch.setattr(estimator, "late_end", judge)
    batch = [submission(str(seed), seed=seed, deadline_seconds=8.0) for seed in range(64)]
    longer = submission("longer", num_images=2, deadline_seconds=8.0)
    assert deadline_refusal((*batch, longer), estimator) is None
    assert judged == [batch[0], longer]
