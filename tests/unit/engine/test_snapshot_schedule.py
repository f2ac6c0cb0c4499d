from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from hidream_grpc.engine.snapshot_schedule import (
    MAX_SHARE,
    SnapshotBudget,
    next_snapshot,
    snapshot_cost_seconds,
)
from tests.support.running_requests import running_request, running_requests


def run(
    budget: SnapshotBudget, running: dict[str, RunningRequest], num_steps: int, cost_seconds: float
) -> list[str | None]:
    """Steps of one second; which request handed up a snapshot after each."""
    taken = []
    for _ in range(num_steps):
        claim_id = next_snapshot(running, tuple(running), budget)
        taken.append(claim_id)
        for request in running.values():
            request.take_step(1.0)
        budget.earn(1.0)
        if claim_id is not None:
            running[claim_id].hand_up(Snapshot(running[claim_id].step, b""))
            budget.spend(cost_seconds)
    return taken


def test_a_request_has_a_snapshot_after_its_first_step_whatever_it_costs() -> None:
    budget, running = SnapshotBudget(), running_requests("a")
    assert run(budget, running, 3, cost_seconds=5.0) == ["a", None, None]
    running["b"] = running_request("b")
    assert run(budget, running, 2, cost_seconds=5.0) == ["b", None]


def test_where_a_snapshot_is_cheap_there_is_one_after_every_step() -> None:
    taken = run(SnapshotBudget(), running_requests("a"), 20, cost_seconds=MAX_SHARE / 2)
    assert taken == ["a"] * 20


def test_requests_of_a_batch_take_turns() -> None:
    taken = run(SnapshotBudget(), running_requests("a", "b", "c"), 9, cost_seconds=MAX_SHARE / 2)
    assert all(sorted(taken[n : n + 3]) == ["a", "b", "c"] for n in (0, 3, 6))  # type: ignore[type-var]


@given(st.integers(1, 5), st.floats(0.001, 0.2))
def test_over_time_snapshots_take_no_more_than_their_share(num_jobs: int, cost_seconds: float) -> None:
    num_steps = 1000
    running = running_requests(*(f"job {number}" for number in range(num_jobs)))
    taken = [claim_id for claim_id in run(SnapshotBudget(), running, num_steps, cost_seconds) if claim_id]
    first = num_jobs * cost_seconds
    assert len(taken) * cost_seconds <= max(first, MAX_SHARE * num_steps) + cost_seconds


def test_what_was_not_needed_is_not_saved_up_for_a_burst() -> None:
    budget, running = SnapshotBudget(), running_requests("a")
    run(budget, running, 1, cost_seconds=0.05)
    budget.earn(1e6)
    assert run(budget, running, 5, cost_seconds=0.05).count("a") == 1


def test_the_way_to_the_server_is_part_of_the_cost() -> None:
    assert snapshot_cost_seconds(0.1, 250_000_000) == pytest.approx(0.6)


def test_a_request_that_has_ended_is_forgotten() -> None:
    budget, running = SnapshotBudget(), running_requests("a")
    run(budget, running, 1, cost_seconds=5.0)
    running["a"] = running_request("a")
    assert next_snapshot(running, ("a",), budget) == "a"
