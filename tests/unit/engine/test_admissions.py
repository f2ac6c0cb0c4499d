from __future__ import annotations

from hidream_grpc.engine.admissions import (
    MAX_ADMITTED_SNAPSHOT_BYTES,
    held_after,
    next_admissions,
    next_releases,
    note_admissions,
)
from hidream_grpc.engine.protocol.messages import Admission, StepPlan
from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from tests.support.running_requests import running_requests


class Ranks:
    """Ranks that do every plan, and what they then hold."""

    def __init__(self) -> None:
        self.held: frozenset[str] = frozenset()

    def do(self, running: dict[str, RunningRequest], suspect: str | None = None) -> StepPlan:
        """The next plan, done."""
        admissions = next_admissions(running, suspect)
        releases = next_releases(running, self.held)
        plan = StepPlan(plan_id=1, releases=releases, admissions=admissions)
        self.held = held_after(self.held, plan)
        note_admissions(running, admissions)
        return plan


def with_snapshots(*claim_ids: str, size_bytes: int) -> dict[str, RunningRequest]:
    running = running_requests(*claim_ids)
    for request in running.values():
        request.snapshot = Snapshot(4, bytes(size_bytes))
    return running


def claim_ids_of(admissions: tuple[Admission, ...]) -> list[str]:
    return [admission.claim_id for admission in admissions]


def admitted(running: dict[str, RunningRequest]) -> set[str]:
    return {claim_id for claim_id, request in running.items() if request.is_admitted}


def test_a_request_is_started_once_and_released_when_it_has_ended() -> None:
    ranks, running = Ranks(), running_requests("a", "b")
    assert claim_ids_of(ranks.do(running).admissions) == ["a", "b"]
    assert ranks.do(running) == StepPlan(plan_id=1)
    del running["a"]
    assert ranks.do(running).releases == ("a",)
    assert ranks.do(running).releases == ()
    assert admitted(running) == ranks.held == {"b"}


def test_a_request_that_left_before_the_next_plan_is_not_started() -> None:
    running = running_requests("a", "b")
    del running["a"]
    assert Ranks().do(running).admissions == (running["b"].admission(),)


def test_beside_a_suspect_no_other_is_started_until_it_is_cleared() -> None:
    ranks, running = Ranks(), running_requests("a", "b", "c")
    assert claim_ids_of(ranks.do(running, suspect="b").admissions) == ["b"]
    assert admitted(running) == {"b"}
    assert claim_ids_of(ranks.do(running).admissions) == ["a", "c"]


def test_a_request_that_is_started_again_is_released_first() -> None:
    ranks, running = Ranks(), running_requests("a")
    ranks.do(running)
    running["a"].restart("a test")
    assert admitted(running) == set()
    again = ranks.do(running)
    assert (again.releases, claim_ids_of(again.admissions)) == (("a",), ["a"])
    assert admitted(running) == ranks.held == {"a"}


def test_a_request_that_is_to_start_again_is_released_even_while_another_runs_alone() -> None:
    ranks, running = Ranks(), running_requests("a", "b")
    ranks.do(running)
    running["a"].restart("a test")
    assert ranks.do(running, suspect="b").releases == ("a",)
    assert ranks.held == {"b"}


def test_snapshots_that_one_plan_cannot_carry_come_with_the_next() -> None:
    ranks = Ranks()
    running = with_snapshots("a", "b", "c", size_bytes=MAX_ADMITTED_SNAPSHOT_BYTES // 2)
    assert claim_ids_of(ranks.do(running).admissions) == ["a", "b"]
    assert admitted(running) == {"a", "b"}
    assert claim_ids_of(ranks.do(running).admissions) == ["c"]


def test_one_snapshot_always_goes_however_large_it_is() -> None:
    running = with_snapshots("a", size_bytes=MAX_ADMITTED_SNAPSHOT_BYTES + 1)
    assert claim_ids_of(Ranks().do(running).admissions) == ["a"]
