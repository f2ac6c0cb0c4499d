from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.jobs.execution.claim_state import ClaimState, StopReason, Storing
from hidream_grpc.jobs.job import CancelReason

REQUESTS = {
    "cancel": lambda state: state.cancelled(CancelReason.REQUESTED),
    "cancel late": lambda state: state.cancelled(CancelReason.DEADLINE),
    "give back": ClaimState.given_back,
    "lose": ClaimState.lost,
}
STRENGTHS = {
    "cancel": StopReason.CANCEL,
    "cancel late": StopReason.CANCEL,
    "give back": StopReason.GIVE_BACK,
    "lose": StopReason.LOST,
}
some_requests = st.lists(st.sampled_from(sorted(REQUESTS)), max_size=8)


def after(requests: list[str], state: ClaimState = ClaimState()) -> ClaimState:  # noqa: B008
    for request in requests:
        state = REQUESTS[request](state)
    return state


@given(some_requests)
def test_the_strongest_reason_wins_in_whatever_order_they_come(requests: list[str]) -> None:
    state = after(requests)
    assert state.stop_reason == max((STRENGTHS[request] for request in requests), default=None)
    assert state.is_running == (not requests)


@given(some_requests, st.sampled_from(sorted(REQUESTS)))
def test_asking_twice_changes_nothing(requests: list[str], request: str) -> None:
    once = after([*requests, request])
    assert REQUESTS[request](once) == once


@given(some_requests)
def test_the_first_reason_to_cancel_stays(requests: list[str]) -> None:
    state = after(requests)
    until_lost = requests[: requests.index("lose")] if "lose" in requests else requests
    cancels = [request for request in until_lost if request.startswith("cancel")]
    first = {"cancel": CancelReason.REQUESTED, "cancel late": CancelReason.DEADLINE}
    assert state.cancel_reason == (first[cancels[0]] if cancels else None)


@given(some_requests, some_requests)
def test_nothing_happens_to_a_claim_that_has_ended(before: list[str], later: list[str]) -> None:
    ended = after(before).ended()
    assert after(later, ended) == ended
    assert not ended.is_running


@given(some_requests)
def test_a_reason_never_becomes_weaker(requests: list[str]) -> None:
    reasons = [after(requests[:length]).stop_reason or 0 for length in range(len(requests) + 1)]
    assert reasons == sorted(reasons)


@pytest.mark.parametrize(
    ("stop_reason", "storing"),
    [
        (None, Storing.UNTIL_STORED),
        (StopReason.GIVE_BACK, Storing.FOR_A_WHILE),
        (StopReason.CANCEL, Storing.UNTIL_STORED),
        (StopReason.LOST, Storing.NEVER),
    ],
)
def test_a_cancel_is_stored_for_sure_a_give_back_perhaps_and_a_loss_never(
    stop_reason: StopReason | None, storing: Storing
) -> None:
    assert replace(ClaimState(), stop_reason=stop_reason).storing is storing
