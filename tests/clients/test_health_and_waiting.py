from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.errors import NotServingError
from hidream.health import HealthStatus
from tests.clients.conftest import HealthOnlyServer
from tests.support.live_server import LiveServer

TIMEOUT_SECONDS = 30.0


@contextmanager
def waiting_thread(client: Client) -> Iterator[threading.Event]:
    """Waits in a thread of its own, which is over when the block is; the event tells its return."""
    has_returned = threading.Event()

    def wait() -> None:
        client.wait_until_serving(TIMEOUT_SECONDS)
        has_returned.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield has_returned
    finally:
        thread.join()


async def test_both_clients_say_that_the_service_serves(server: LiveServer) -> None:
    with Client(server.address) as client:
        assert client.health() is HealthStatus.SERVING
        assert client.health(service="") is HealthStatus.SERVING
        client.wait_until_serving(TIMEOUT_SECONDS)
    async with AsyncClient(server.address) as async_client:
        assert await async_client.health() is HealthStatus.SERVING
        await async_client.wait_until_serving(TIMEOUT_SECONDS)


def test_a_service_that_loads_is_not_serving_and_waiting_returns_when_it_does(
    health_only_server: HealthOnlyServer,
) -> None:
    health_only_server.start()
    with Client(health_only_server.address) as client:
        assert client.health() is HealthStatus.NOT_SERVING
        with waiting_thread(client) as has_returned:
            assert not has_returned.is_set()
            health_only_server.is_serving = True
            assert has_returned.wait(TIMEOUT_SECONDS)


def test_waiting_begins_before_anything_listens(health_only_server: HealthOnlyServer) -> None:
    health_only_server.is_serving = True
    with Client(health_only_server.address) as client, waiting_thread(client) as has_returned:
        assert not has_returned.is_set()
        health_only_server.start()
        assert has_returned.wait(TIMEOUT_SECONDS)


async def test_waiting_in_asyncio_returns_when_the_service_serves(
    health_only_server: HealthOnlyServer,
) -> None:
    health_only_server.start()
    async with AsyncClient(health_only_server.address) as client:
        waiting = asyncio.create_task(client.wait_until_serving(TIMEOUT_SECONDS))
        assert await client.health() is HealthStatus.NOT_SERVING
        assert not waiting.done()
        health_only_server.is_serving = True
        await waiting


def test_waiting_gives_up_in_time_and_says_what_it_saw(health_only_server: HealthOnlyServer) -> None:
    health_only_server.start()
    with Client(health_only_server.address) as client, pytest.raises(NotServingError) as caught:
        client.wait_until_serving(1.0)
    assert str(caught.value) == "not serving after 1 s: its health is NOT_SERVING"


async def test_waiting_where_nobody_listens_gives_up_in_time(closed_address: str) -> None:
    with Client(closed_address) as client, pytest.raises(NotServingError, match="nothing answers"):
        client.wait_until_serving(0.5)
    async with AsyncClient(closed_address) as async_client:
        with pytest.raises(NotServingError, match="nothing answers"):
            await async_client.wait_until_serving(0.5)
