from __future__ import annotations

import time

import pytest

from hidream_grpc.jobs.store.clock import MAX_CAUTION_SECONDS, MAX_SAMPLE_SECONDS, MAX_SLEW, StoreClock


class Elapsed:
    """Time since boot, as the test lets it pass."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_step_of_the_machines_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    start = clock.now()
    monkeypatch.setattr(time, "time", lambda: start + 7200.0)
    elapsed.seconds += 5.0
    assert clock.now() == pytest.approx(start + 5.0)


def test_the_time_of_the_database_is_taken_over_at_the_middle_of_the_question() -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    asked_at = clock.elapsed_seconds()
    elapsed.seconds += 0.4
    clock.follow(5_000_000.0, asked_at)
    assert clock.now() == pytest.approx(5_000_000.2)


def test_an_answer_that_took_too_long_is_not_taken_for_the_time() -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    asked_at, before = clock.elapsed_seconds(), clock.now()
    elapsed.seconds += MAX_SAMPLE_SECONDS + 0.1
    clock.follow(5_000_000.0, asked_at)
    assert clock.now() == pytest.approx(before + MAX_SAMPLE_SECONDS + 0.1)


@pytest.mark.parametrize("step_seconds", [7200.0, -7200.0], ids=["ahead", "back"])
def test_a_step_of_the_databases_clock_makes_nothing_old(step_seconds: float) -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    clock.follow(5_000_000.0, clock.elapsed_seconds())
    elapsed.seconds += 10.0
    clock.follow(5_000_010.0 + step_seconds, clock.elapsed_seconds())
    assert clock.now() == pytest.approx(5_000_010.0 + step_seconds), "as all replicas tell it"
    assert clock.cautious_now() == pytest.approx(5_000_010.0 + min(10 * MAX_SLEW, step_seconds))


def test_a_clock_that_was_set_right_is_caught_up_with_in_the_end() -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    clock.follow(5_000_000.0, clock.elapsed_seconds())
    for _day in range(10):
        elapsed.seconds += 86_400.0
        clock.follow(5_007_200.0 + elapsed.seconds, clock.elapsed_seconds())
    assert clock.cautious_now() == clock.now()


def test_a_clock_that_steps_by_years_is_followed_but_for_a_day() -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    clock.follow(1_000.0, clock.elapsed_seconds())
    clock.follow(1_800_000_000.0, clock.elapsed_seconds())
    assert clock.now() - clock.cautious_now() == pytest.approx(MAX_CAUTION_SECONDS)


def test_a_machines_clock_that_was_wrong_at_the_start_does_not_last() -> None:
    elapsed = Elapsed()
    clock = StoreClock(elapsed)
    for epoch_seconds in (clock.now() + 7200.0, clock.now() - 7200.0):
        fresh = StoreClock(elapsed)
        assert fresh.cautious_now() == fresh.now()
        fresh.follow(epoch_seconds, fresh.elapsed_seconds())
        assert fresh.cautious_now() == fresh.now() == pytest.approx(epoch_seconds)
