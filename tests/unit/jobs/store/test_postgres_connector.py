from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import pytest

from hidream_grpc.jobs.store.postgresql import PostgresConnector
from hidream_grpc.jobs.store.url import PostgresDatabase, parse_store_url

NUM_CALLS = 10


async def test_connects_that_are_made_at_once_after_a_failover_all_reach_the_new_primary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    primary, asked, all_ask = "old", list[str](), asyncio.Event()

    async def connect(*, host: str, **_: Any) -> str:
        asked.append(host)
        if len(asked) >= NUM_CALLS:
            all_ask.set()
        await all_ask.wait()
        if host != primary:
            raise ConnectionRefusedError
        return host

    monkeypatch.setattr(asyncpg, "connect", connect)
    database = parse_store_url("postgresql://old,new/db")
    assert isinstance(database, PostgresDatabase)
    connector = PostgresConnector(database)
    for primary in ("new", "old"):
        asked.clear()
        all_ask.clear()
        reached = await asyncio.gather(*(connector.connect() for _ in range(NUM_CALLS)))
        assert reached == [primary] * NUM_CALLS
        # The next one asks nobody else first.
        asked.clear()
        assert [await connector.connect(), *asked] == [primary, primary]
