from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.suspects import attribute, find_suspect
from tests.support.running_requests import running_request, running_requests


def test_no_request_is_suspected_at_first() -> None:
    assert find_suspect(running_requests("a", "b")) is None


def test_a_request_that_does_it_alone_has_a_second_try() -> None:
    running = {"a": running_request("a", step=3)}
    assert attribute(running, {"a": 3}, was_alone=True) is None
    assert attribute(running, {"a": 3}, was_alone=True) == "a"
    del running["a"]
    assert find_suspect(running) is None


def test_a_second_time_alone_is_one_too_many_however_far_it_came_between() -> None:
    running = {"a": running_request("a", step=3)}
    attribute(running, {"a": 3}, was_alone=True)
    running["a"].step = 39
    running["a"].take_step(1.0)
    assert find_suspect(running) is None
    assert attribute(running, {"a": 40}, was_alone=True) == "a"


def test_all_of_a_batch_run_alone_one_after_another_until_each_has_come_further() -> None:
    running = {"a": running_request("a", step=2), "b": running_request("b", step=8)}
    assert attribute(running, {"a": 3, "b": 8}, was_alone=False) is None
    assert find_suspect(running) == "a"
    running["a"].take_step(1.0)
    assert running["a"].progress == 3
    assert find_suspect(running) == "a"
    running["a"].take_step(1.0)
    assert find_suspect(running) == "b"
    running["b"].finish_image(0)
    assert running["b"].progress == 9
    assert find_suspect(running) is None


def test_a_suspect_that_comes_further_stays_cleared_when_it_is_put_back() -> None:
    running = {"a": running_request("a", step=3)}
    attribute(running, {"a": 3}, was_alone=True)
    running["a"].take_step(1.0)
    running["a"].restart("killed from outside")
    assert running["a"].progress == 0
    assert find_suspect(running) is None


def test_a_suspect_that_has_left_suspends_no_other() -> None:
    running = {"a": running_request("a", step=3), "b": running_request("b", step=8)}
    attribute(running, {"a": 3, "b": 8}, was_alone=False)
    del running["a"]
    assert find_suspect(running) == "b"


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True), st.sampled_from("abcd"))
def test_whichever_are_in_the_batch_only_the_one_that_breaks_groups_is_the_culprit(
    batch: list[str], poison: str
) -> None:
    running = running_requests(*batch)
    for _ in range(20):
        suspect = find_suspect(running)
        at_work = [suspect] if suspect else list(running)
        if poison in at_work:
            progress = {claim_id: running[claim_id].progress for claim_id in at_work}
            culprit = attribute(running, progress, was_alone=len(at_work) == 1)
            if culprit is not None:
                assert culprit == poison
                del running[poison]
        else:
            for claim_id in at_work:
                running[claim_id].take_step(1.0)
    assert set(running) == set(batch) - {poison}
    assert all(request.step > 0 for request in running.values())
