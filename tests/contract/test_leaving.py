from __future__ import annotations

import asyncio

import pytest

from hidream_grpc.jobs.replicas import membership as membership_module
from hidream_grpc.jobs.replicas.membership import LiveModel, Membership
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.passing_clock import PassingClock
from tests.unit.jobs.service_bench import DEFAULTS, EXECUTION, LIMITS, MODEL_IDENTITY, TOKENIZERS

LEASE_SECONDS = 3600.0


async def test_a_replica_that_has_left_waits_for_its_end_without_a_look_at_the_store(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = PassingClock()
    monkeypatch.setattr(membership_module, "boot_seconds", clock)
    model = LiveModel(MODEL_IDENTITY, TOKENIZERS, EXECUTION.scheduler, EXECUTION.shift, LIMITS, DEFAULTS)
    membership = Membership(store, model, LEASE_SECONDS, on_removed=lambda: None)
    await membership.join()
    await membership.beat()
    await membership.leave()
    clock.let_pass(LEASE_SECONDS)
    await membership.pause()
    await membership.beat()
    pausing = asyncio.ensure_future(membership.pause())
    await asyncio.sleep(0)
    assert not pausing.done()
    pausing.cancel()
    assert not await store.replicas()
