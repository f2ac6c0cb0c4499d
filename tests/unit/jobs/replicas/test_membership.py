from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.jobs.replicas.membership import LiveModel, Membership, SilenceObserver
from hidream_grpc.jobs.store.records import ReplicaRecord
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.unit.jobs.service_bench import DEFAULTS, EXECUTION, LIMITS, MODEL_IDENTITY, TOKENIZERS

LEASE_SECONDS = 15.0
GAP_SECONDS = 10.0


def records(heartbeats: Mapping[str, int]) -> list[ReplicaRecord]:
    return [ReplicaRecord(replica_id, heartbeat, "{}") for replica_id, heartbeat in heartbeats.items()]


def dead_after(looks: Sequence[tuple[float, Mapping[str, int]]]) -> set[str]:
    """The replicas that the last of the looks finds dead."""
    observer = SilenceObserver(LEASE_SECONDS, GAP_SECONDS)
    found: list[ReplicaRecord] = []
    for now, heartbeats in looks:
        found = observer.dead(records(heartbeats), now)
    return {record.replica_id for record in found}


def test_a_replica_that_is_silent_for_a_lease_is_dead_and_one_that_beats_is_not() -> None:
    looks = [(5.0 * look, {"silent": 7, "beats": look}) for look in range(4)]
    assert dead_after(looks[:3]) == set()
    assert dead_after(looks) == {"silent"}


def test_the_silence_begins_anew_with_every_beat() -> None:
    looks: list[tuple[float, Mapping[str, int]]] = [(0, {"a": 1}), (10, {"a": 1}), (14, {"a": 2})]
    assert dead_after([*looks, (24, {"a": 2})]) == set()
    assert dead_after([*looks, (24, {"a": 2}), (29, {"a": 2})]) == {"a"}


@pytest.mark.parametrize("pause_seconds", [100.0, 86_400.0])
def test_the_observers_own_pause_is_nobody_elses_silence(pause_seconds: float) -> None:
    woken = 5.0 + pause_seconds
    looks: list[tuple[float, Mapping[str, int]]] = [(0, {"a": 1}), (5, {"a": 2}), (woken, {"a": 2})]
    assert dead_after(looks) == set(), "it was stopped as well, and has had no time to beat"
    assert dead_after([*looks, (woken + 5, {"a": 2})]) == {"a"}


@given(st.lists(st.floats(0, 30), min_size=2, max_size=20))
def test_no_replica_is_dead_at_the_first_look_whatever_its_heartbeat(gaps: list[float]) -> None:
    now, observer = 0.0, SilenceObserver(LEASE_SECONDS, GAP_SECONDS)
    for number, gap in enumerate(gaps):
        now += gap
        assert observer.dead(records({f"replica {number}": 5}), now) == []


OWN_MODEL = LiveModel(MODEL_IDENTITY, TOKENIZERS, EXECUTION.scheduler, EXECUTION.shift, LIMITS, DEFAULTS)
OTHER_MODEL = replace(OWN_MODEL, identity=replace(MODEL_IDENTITY, fingerprint="ffff"))


@pytest.mark.parametrize(
    ("others", "shares_queue"),
    [
        pytest.param([], False, id="alone"),
        pytest.param([msgspec.json.encode(OTHER_MODEL).decode()], False, id="beside another model"),
        pytest.param([msgspec.json.encode(OWN_MODEL).decode()], True, id="beside its own model"),
        pytest.param(["{}"], True, id="beside a version that it cannot read"),
    ],
)
async def test_a_replica_shares_its_queue_with_those_that_may_run_its_jobs(
    tmp_path: Path, others: Sequence[str], shares_queue: bool
) -> None:
    store = SqlJobStore(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}")
    await store.open()
    membership = Membership(store, OWN_MODEL, LEASE_SECONDS, on_removed=lambda: None)
    await membership.join()
    for number, model in enumerate(others):
        await store.join(f"other {number}", model, None)
    await membership.beat()
    assert membership.shares_queue is shares_queue
    for number in range(len(others)):
        await store.remove_replica(f"other {number}")
    await membership.beat()
    assert not membership.shares_queue
    await store.close()
