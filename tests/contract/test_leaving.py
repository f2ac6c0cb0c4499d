from __future__ import annotations

import asyncio

from hidream_grpc.jobs.replicas.membership import LiveModel, Membership
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.unit.jobs.service_bench import DEFAULTS, EXECUTION, LIMITS, MODEL_IDENTITY, TOKENIZERS

LEASE_SECONDS = 0.05


async def test_a_replica_that_has_left_waits_for_its_end_without_a_look_at_the_store(
    store: SqlJobStore,
) -> None:
    model = LiveModel(MODEL_IDENTITY, TOKENIZERS, EXECUTION.scheduler, EXECUTION.shift, LIMITS, DEFAULTS)
    membership = Membership(store, model, LEASE_SECONDS, on_removed=lambda: None)
    await membership.join()
    await membership.beat()
    await membership.leave()
    # Until the next heartbeat was due.
    await membership.pause()
    await membership.beat()
    pausing = asyncio.ensure_future(membership.pause())
    await asyncio.sleep(0)
    assert not pausing.done()
    pausing.cancel()
    assert not await store.replicas()
