from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.suspects import Strikes


def test_nobody_is_suspected_at_first() -> None:
    assert Strikes().suspect is None


def test_a_job_that_does_it_alone_has_a_second_try() -> None:
    strikes = Strikes()
    assert strikes.strike({"a": 3}, was_alone=True) is None
    assert strikes.strike({"a": 3}, was_alone=True) == "a"
    assert strikes.suspect is None


def test_a_second_time_alone_is_one_too_many_however_far_it_came_between() -> None:
    strikes = Strikes()
    strikes.strike({"a": 3}, was_alone=True)
    strikes.progressed("a", 40)
    assert strikes.suspect is None
    assert strikes.strike({"a": 40}, was_alone=True) == "a"


def test_all_of_a_batch_run_alone_one_after_another_until_each_has_come_further() -> None:
    strikes = Strikes()
    assert strikes.strike({"a": 3, "b": 8}, was_alone=False) is None
    assert strikes.suspect == "a"
    strikes.progressed("a", 3)
    assert strikes.suspect == "a"
    strikes.progressed("a", 4)
    assert strikes.suspect == "b"
    strikes.progressed("b", 9)
    assert strikes.suspect is None


def test_a_suspect_that_has_left_suspends_nobody() -> None:
    strikes = Strikes()
    strikes.strike({"a": 3, "b": 8}, was_alone=False)
    strikes.forget("a")
    assert strikes.suspect == "b"


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True), st.sampled_from("abcd"))
def test_whoever_is_in_the_batch_only_the_one_that_breaks_groups_is_guilty(
    batch: list[str], poison: str
) -> None:
    strikes = Strikes()
    progress = dict.fromkeys(batch, 0)
    for _ in range(20):
        running = [strikes.suspect] if strikes.suspect else list(progress)
        if poison in running:
            guilty = strikes.strike({job: progress[job] for job in running}, was_alone=len(running) == 1)
            if guilty is not None:
                assert guilty == poison
                del progress[poison]
        else:
            for job in running:
                progress[job] += 1
                strikes.progressed(job, progress[job])
    assert set(progress) == set(batch) - {poison}
    assert all(steps > 0 for steps in progress.values())
