"""An answer of many parts, as fast as its reader; where it is cut short, the reader can tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hidream.errors import ServerError
from hidream_http.leaving import ended, presence
from hidream_http.problems import CLIENT_CLOSED_REQUEST, Problem, ProblemError, problem_of

SIGN_OF_LIFE_SECONDS = 15.0


def say_nothing(_: Problem) -> bytes:
    """The last part of a broken file: its length alone says that it is not whole."""
    return b""


class PartsResponse(Response):
    """Asks for the next part when the one before is written.

    An error of the parts is told in a last part, and the connection is broken off.
    """

    def __init__(
        self,
        ending: asyncio.Event,
        parts: AsyncGenerator[bytes],
        headers: Mapping[str, str],
        *,
        status_code: int = 200,
        first: asyncio.Task[bytes | None] | None = None,
        problem_part: Callable[[Problem], bytes] = say_nothing,
        sign_of_life: bytes = b"",
    ) -> None:
        """Send nothing yet.

        Args:
            ending: is set when the parts must end, because the bridge does.
            parts: is closed when nobody reads any more, which cancels what it waits for.
            headers: with the media type.
            status_code: of HTTP.
            first: waits for the first part, where that has begun.
            problem_part: the last part where an error ends them.
            sign_of_life: is sent while there is no part; empty for none.
        """
        self.status_code = status_code
        self.background = None
        self.init_headers(headers)
        self._ending = ending
        self._parts = parts
        self._next = first
        self._problem_part = problem_part
        self._sign_of_life = sign_of_life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all parts, or as many as there are before an error."""
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            if (problem := await self._send_parts(receive, send)) is None:
                await send({"type": "http.response.body", "body": b""})
            elif problem.status != CLIENT_CLOSED_REQUEST:
                # No last part follows: the server of ASGI breaks the connection off.
                await _send_part(send, self._problem_part(problem))
        finally:
            if self._next is not None:
                await ended(self._next)
            await self._parts.aclose()

    async def _send_parts(self, receive: Receive, send: Send) -> Problem | None:
        """Send all parts; what has ended them before their end, if anything has."""
        try:
            async with presence(receive, self._ending) as present:
                await _send_part(send, self._sign_of_life)
                while True:
                    self._next = self._next or asyncio.create_task(anext(self._parts, None))
                    while not await present.wait_for(self._next, SIGN_OF_LIFE_SECONDS):
                        await _send_part(send, self._sign_of_life)
                    if (part := self._next.result()) is None:
                        return None
                    self._next = None
                    await _send_part(send, part)
        except (ServerError, ProblemError) as error:
            return problem_of(error)


async def _send_part(send: Send, part: bytes) -> None:
    if part:
        await send({"type": "http.response.body", "body": part, "more_body": True})
