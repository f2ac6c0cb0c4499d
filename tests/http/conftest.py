from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import LiveServer


@pytest.fixture(scope="session")
def bridge(server: LiveServer) -> Iterator[LiveBridge]:
    """One bridge before the shared server, for all tests that leave both as they found them."""
    with running_bridge(server.address) as live:
        yield live


@pytest.fixture
def http(bridge: LiveBridge) -> Iterator[httpx.Client]:
    """A client of the shared bridge."""
    with bridge.client() as client:
        yield client
