"""The two transports of the Python client, called in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.reconnecting import DEFAULT_POLICY, ReconnectPolicy
from hidream.v1 import job_pb2
from tests.clients.breaking_server import JOB_ID


class EitherClient:
    """Calls one of the two clients, and gives back what came of it."""

    def __init__(self, is_async: bool, address: str) -> None:
        self._is_async = is_async
        self._address = address

    def items(self, method: str, *arguments: Any, limit: int | None = None, **options: Any) -> list[Any]:
        if not self._is_async:
            with Client(self._address) as client:
                return list(islice(getattr(client, method)(*arguments, **options), limit))
        return asyncio.run(self._async_items(method, limit, arguments, options))

    async def _async_items(
        self, method: str, limit: int | None, arguments: Iterable[Any], options: dict[str, Any]
    ) -> list[Any]:
        async with AsyncClient(self._address) as client:
            stream: AsyncIterator[Any] = getattr(client, method)(*arguments, **options)
            items: list[Any] = []
            async for item in stream:
                items.append(item)
                if len(items) == limit:
                    break
            return items

    def download(self, path: Path, policy: ReconnectPolicy = DEFAULT_POLICY) -> None:
        if not self._is_async:
            with Client(self._address) as client:
                client.download(JOB_ID, path, policy=policy)
            return

        async def download() -> None:
            async with AsyncClient(self._address) as client:
                await client.download(JOB_ID, path, policy=policy)

        asyncio.run(download())

    def waited(self) -> job_pb2.Job:
        if not self._is_async:
            with Client(self._address) as client:
                return client.wait(JOB_ID)

        async def wait() -> job_pb2.Job:
            async with AsyncClient(self._address) as client:
                return await client.wait(JOB_ID)

        return asyncio.run(wait())
