from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.engine.snapshot_schedule import MAX_SHARE, SnapshotPace

SIZE_BYTES = 0


def run(pace: SnapshotPace, jobs: tuple[str, ...], num_steps: int, cost_seconds: float) -> list[str | None]:
    """Steps of one second; who handed up a snapshot after each."""
    taken = []
    for _ in range(num_steps):
        claim_id = pace.next_claim(jobs)
        taken.append(claim_id)
        pace.stepped(jobs, 1.0)
        if claim_id is not None:
            pace.taken(claim_id, cost_seconds, SIZE_BYTES)
    return taken


def test_a_job_has_a_snapshot_after_its_first_step_whatever_it_costs() -> None:
    pace = SnapshotPace()
    assert run(pace, ("a",), 3, cost_seconds=5.0) == ["a", None, None]
    assert run(pace, ("a", "b"), 2, cost_seconds=5.0) == ["b", None]


def test_where_a_snapshot_is_cheap_there_is_one_after_every_step() -> None:
    assert run(SnapshotPace(), ("a",), 20, cost_seconds=MAX_SHARE / 2) == ["a"] * 20


def test_jobs_of_a_batch_take_turns() -> None:
    taken = run(SnapshotPace(), ("a", "b", "c"), 9, cost_seconds=MAX_SHARE / 2)
    assert all(sorted(taken[n : n + 3]) == ["a", "b", "c"] for n in (0, 3, 6))  # type: ignore[type-var]


@given(st.integers(1, 5), st.floats(0.001, 0.2))
def test_over_time_snapshots_take_no_more_than_their_share(num_jobs: int, cost_seconds: float) -> None:
    num_steps = 1000
    jobs = tuple(f"job {number}" for number in range(num_jobs))
    taken = [claim_id for claim_id in run(SnapshotPace(), jobs, num_steps, cost_seconds) if claim_id]
    first = num_jobs * cost_seconds
    assert len(taken) * cost_seconds <= max(first, MAX_SHARE * num_steps) + cost_seconds


def test_what_was_not_needed_is_not_saved_up_for_a_burst() -> None:
    pace = SnapshotPace()
    run(pace, ("a",), 1, cost_seconds=0.05)
    pace.stepped((), 1e6)
    assert run(pace, ("a",), 5, cost_seconds=0.05).count("a") == 1


def test_the_way_to_the_server_is_part_of_the_cost() -> None:
    assert SnapshotPace().taken("a", 0.1, 250_000_000) == pytest.approx(0.6)


def test_a_job_that_has_ended_is_forgotten() -> None:
    pace = SnapshotPace()
    run(pace, ("a",), 1, cost_seconds=5.0)
    pace.forget("a")
    assert pace.next_claim(("a",)) == "a"
