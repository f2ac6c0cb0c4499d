from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import CallerQuotaError, InvalidRequestError
from hidream_grpc.jobs.intake import WINDOW_SECONDS, CallerQuotas

LIMIT = 100


@dataclass
class Bench:
    """Quotas, the clock that they go by, and what they let through."""

    limit: int | None = LIMIT
    seconds: float = 1000.0
    accepted: list[tuple[str, float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.quotas = CallerQuotas(self.limit, lambda: self.seconds)

    def ask(self, pixel_steps: int, caller: str = "alice") -> None:
        with self.quotas.charged(caller, pixel_steps):
            self.accepted.append((caller, self.seconds, pixel_steps))

    def retry_after_seconds(self, pixel_steps: int, caller: str = "alice") -> float:
        with pytest.raises(CallerQuotaError) as refused:
            self.ask(pixel_steps, caller)
        assert (refused.value.caller, refused.value.pixel_steps) == (caller, pixel_steps)
        return refused.value.retry_after_seconds


def test_a_caller_may_use_its_whole_limit_and_gets_it_back_as_its_work_grows_old() -> None:
    bench = Bench()
    bench.ask(60)
    bench.seconds += 20
    bench.ask(40)
    assert bench.retry_after_seconds(1) == 40
    assert bench.retry_after_seconds(60) == 40
    assert bench.retry_after_seconds(61) == 60
    bench.seconds += 40
    bench.ask(60)


def test_one_caller_does_not_use_up_what_another_has() -> None:
    bench = Bench()
    bench.ask(LIMIT, "alice")
    bench.ask(LIMIT, "bob")
    assert bench.retry_after_seconds(1, "alice") == WINDOW_SECONDS


def test_what_no_minute_has_room_for_is_never_asked_to_come_back() -> None:
    bench = Bench()
    with pytest.raises(
        InvalidRequestError, match=r"at most 100 \(max_pixel_steps_per_minute_per_caller\), is 101"
    ):
        bench.ask(LIMIT + 1)
    bench.ask(LIMIT)


def test_work_that_was_refused_by_others_does_not_count() -> None:
    bench = Bench()
    with pytest.raises(RuntimeError), bench.quotas.charged("alice", LIMIT):
        raise RuntimeError("the queue is full")
    bench.ask(LIMIT)


def test_work_that_is_being_accepted_counts_already() -> None:
    bench = Bench()
    with bench.quotas.charged("alice", 60), pytest.raises(CallerQuotaError):
        bench.ask(60)


def test_giving_back_what_has_grown_old_takes_nothing_from_others() -> None:
    bench = Bench()
    with pytest.raises(RuntimeError), bench.quotas.charged("alice", 60):
        bench.seconds += WINDOW_SECONDS
        bench.ask(60)
        raise RuntimeError("the store does not answer")
    assert bench.retry_after_seconds(60) == WINDOW_SECONDS


def test_without_a_limit_everything_is_let_through() -> None:
    bench = Bench(limit=None)
    for _ in range(3):
        bench.ask(2**63)


WISHES = st.lists(
    st.tuples(st.sampled_from(["alice", "bob"]), st.integers(0, 40), st.integers(1, LIMIT)), max_size=60
)


@given(wishes=WISHES)
def test_no_minute_holds_more_of_a_caller_than_its_limit(wishes: list[tuple[str, int, int]]) -> None:
    bench = Bench()
    for caller, wait_seconds, pixel_steps in wishes:
        bench.seconds += wait_seconds
        try:
            bench.ask(pixel_steps, caller)
        except CallerQuotaError:
            recent = [
                work for who, when, work in bench.accepted if who == caller and when + 60 > bench.seconds
            ]
            # It was refused for a reason.
            assert sum(recent) + pixel_steps > LIMIT
    for caller, start, _ in bench.accepted:
        minute = [work for who, when, work in bench.accepted if who == caller and start <= when < start + 60]
        assert sum(minute) <= LIMIT


@given(wishes=WISHES)
def test_who_comes_back_after_the_time_that_was_told_is_let_through_and_not_before(
    wishes: list[tuple[str, int, int]],
) -> None:
    bench = Bench()
    for caller, wait_seconds, pixel_steps in wishes:
        bench.seconds += wait_seconds
        try:
            bench.ask(pixel_steps, caller)
        except CallerQuotaError as refused:
            assert 0 < refused.retry_after_seconds <= WINDOW_SECONDS
            bench.seconds += refused.retry_after_seconds - 0.5
            with pytest.raises(CallerQuotaError):
                bench.ask(pixel_steps, caller)
            bench.seconds += 0.5
            bench.ask(pixel_steps, caller)


def test_callers_of_whom_nothing_is_left_are_forgotten() -> None:
    bench = Bench()
    for number in range(100):
        bench.ask(1, f"caller {number}")
    bench.seconds += WINDOW_SECONDS
    bench.ask(1, "alice")
    assert list(bench.quotas._charges) == ["alice"]
