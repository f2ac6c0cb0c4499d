"""Work for a request ends when its caller leaves, and when the bridge ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from hidream_http.draining import Drain, end_of_bridge
from hidream_http.problems import CLIENT_CLOSED_REQUEST, Problem, ProblemError

_T = TypeVar("_T")


class Presence:
    """Whether the caller of a request is still there, and the bridge goes on."""

    def __init__(self, receive: Receive, ending: asyncio.Event) -> None:
        self._leaving = asyncio.create_task(_has_left(receive))
        self._ending = asyncio.create_task(ending.wait())

    async def wait_for(self, work: asyncio.Future[Any], timeout_seconds: float | None = None) -> bool:
        """Wait for work, which goes on when the time is over; whether it is done.

        Raises:
            ProblemError: the caller has left, or the bridge ends.
        """
        await asyncio.wait(
            (work, self._leaving, self._ending),
            timeout=timeout_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if work.done():
            return True
        if self._leaving.done():
            raise ProblemError(Problem(CLIENT_CLOSED_REQUEST, "the caller has left", "CANCELLED"))
        if self._ending.done():
            raise end_of_bridge()
        return False

    async def close(self) -> None:
        """Look no further."""
        await ended(self._leaving, self._ending)


@asynccontextmanager
async def presence(receive: Receive, ending: asyncio.Event) -> AsyncIterator[Presence]:
    """Look at the connection while the block lasts; the body of the request must have been read.

    Args:
        receive: of the request.
        ending: is set when the request must end, because the bridge does.
    """
    watched = Presence(receive, ending)
    try:
        yield watched
    finally:
        await watched.close()


async def unless_left(request: Request, drain: Drain, work: Coroutine[Any, Any, _T]) -> _T:
    """Do work for a request; cancel it when the caller leaves.

    Raises:
        ProblemError: the caller has left, or the bridge ends.
    """
    working = asyncio.create_task(work)
    try:
        async with presence(request.receive, drain.is_over) as watched:
            await watched.wait_for(working)
            return working.result()
    finally:
        await ended(working)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks that are not done, and wait until they are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _has_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
