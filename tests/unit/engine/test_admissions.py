from __future__ import annotations

from hidream_grpc.engine.admissions import MAX_ADMITTED_SNAPSHOT_BYTES, Admissions
from hidream_grpc.engine.protocol.messages import Admission, StepPlan
from hidream_grpc.engine.requests import EngineRequest
from hidream_grpc.engine.running_request import RunningRequest, Snapshot
from hidream_grpc.model.parameters import GenerationParameters


def running(*claim_ids: str, snapshot_bytes: int = 0) -> dict[str, RunningRequest]:
    parameters = GenerationParameters(
        prompt="", width=64, height=64, num_inference_steps=9, guidance_scale=1.0, seed=0
    )
    snapshot = Snapshot(4, bytes(snapshot_bytes)) if snapshot_bytes else None
    return {
        claim_id: RunningRequest(
            EngineRequest(
                claim_id, f"job of {claim_id}", f"request of {claim_id}", parameters, lambda _event: None
            ),
            snapshot=snapshot,
        )
        for claim_id in claim_ids
    }


def asked(*claim_ids: str) -> Admissions:
    admissions = Admissions()
    for claim_id in claim_ids:
        admissions.ask(claim_id)
    return admissions


def do(admissions: Admissions, jobs: dict[str, RunningRequest], suspect: str | None = None) -> StepPlan:
    """One plan, done by the ranks."""
    taken = admissions.take(jobs, suspect)
    plan = StepPlan(plan_id=1, releases=admissions.releases(jobs, taken), admissions=taken)
    admissions.planned(plan)
    admissions.done(plan)
    return plan


def claim_ids_of(admissions: tuple[Admission, ...]) -> list[str]:
    return [admission.claim_id for admission in admissions]


def test_a_request_is_started_once_and_released_when_it_has_ended() -> None:
    admissions, jobs = asked("a", "b"), running("a", "b")
    assert claim_ids_of(do(admissions, jobs).admissions) == ["a", "b"]
    assert do(admissions, jobs) == StepPlan(plan_id=1)
    del jobs["a"]
    assert do(admissions, jobs).releases == ("a",)
    assert do(admissions, jobs).releases == ()
    assert admissions.ready(()) == {"b"}


def test_who_left_before_the_next_plan_is_not_started() -> None:
    assert do(asked("a", "b"), running("b")).admissions == (running("b")["b"].admission(),)


def test_beside_a_suspect_nobody_is_started_until_it_is_cleared() -> None:
    admissions, jobs = asked("a", "b", "c"), running("a", "b", "c")
    assert claim_ids_of(do(admissions, jobs, suspect="b").admissions) == ["b"]
    assert admissions.ready(()) == {"b"}
    assert claim_ids_of(do(admissions, jobs).admissions) == ["a", "c"]


def test_a_request_that_is_started_again_is_released_first() -> None:
    admissions, jobs = asked("a"), running("a")
    do(admissions, jobs)
    admissions.ask("a")
    assert admissions.ready(()) == set()
    again = do(admissions, jobs)
    assert (again.releases, claim_ids_of(again.admissions)) == (("a",), ["a"])
    assert admissions.ready(()) == {"a"}


def test_snapshots_that_one_plan_cannot_carry_come_with_the_next() -> None:
    jobs = running("a", "b", "c", snapshot_bytes=MAX_ADMITTED_SNAPSHOT_BYTES // 2)
    admissions = asked(*jobs)
    assert claim_ids_of(do(admissions, jobs).admissions) == ["a", "b"]
    assert admissions.ready(()) == {"a", "b"}
    assert claim_ids_of(do(admissions, jobs).admissions) == ["c"]


def test_one_snapshot_always_goes_however_large_it_is() -> None:
    jobs = running("a", snapshot_bytes=MAX_ADMITTED_SNAPSHOT_BYTES + 1)
    assert claim_ids_of(do(asked("a"), jobs).admissions) == ["a"]


def test_ranks_of_a_new_generation_hold_nothing() -> None:
    admissions, jobs = asked("a", "b"), running("a", "b")
    do(admissions, jobs)
    admissions.forget_all()
    assert admissions.ready(()) == set()
    assert do(admissions, jobs) == StepPlan(plan_id=1)
