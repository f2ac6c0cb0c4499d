from __future__ import annotations

from unittest.mock import AsyncMock

import pytest
from grpc_health.v1 import health_pb2

from hidream_grpc.server.health import IMAGE_GEN, LIVENESS, HealthServicer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def statuses(health: HealthServicer) -> dict[str, int]:
    """What List says once all changes so far are made."""
    await health._changes.wait()
    listed = await health.List(health_pb2.HealthListRequest(), AsyncMock())
    return {service: response.status for service, response in listed.statuses.items()}


@pytest.fixture
async def health() -> HealthServicer:
    return HealthServicer()


async def test_a_new_server_is_alive_and_not_ready(health: HealthServicer) -> None:
    assert await statuses(health) == {"": NOT_SERVING, IMAGE_GEN: NOT_SERVING, LIVENESS: SERVING}


async def test_readiness_comes_and_goes_and_liveness_stays(health: HealthServicer) -> None:
    health.mark_ready(True)
    assert await statuses(health) == {"": SERVING, IMAGE_GEN: SERVING, LIVENESS: SERVING}
    for is_ready in (False, True, False):
        health.mark_ready(is_ready)
    assert await statuses(health) == {"": NOT_SERVING, IMAGE_GEN: NOT_SERVING, LIVENESS: SERVING}


async def test_a_server_that_drains_never_becomes_ready_again(health: HealthServicer) -> None:
    health.mark_ready(True)
    health.mark_draining()
    # As when a rank is replaced meanwhile.
    health.mark_ready(True)
    assert await statuses(health) == {"": NOT_SERVING, IMAGE_GEN: NOT_SERVING, LIVENESS: SERVING}
