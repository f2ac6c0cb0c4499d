"""A stream of messages as one answer of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from hidream_http.leaving import ended, presence
from hidream_http.parts import PartsResponse
from hidream_http.transcoding.framing import Framing

BEGIN_SECONDS = 1.0
"""A stream whose first message takes longer begins without it, so that a caller knows that it is open."""


async def stream_response(
    request: Request, ending: asyncio.Event, messages: AsyncGenerator[Message], framing: Framing
) -> Response:
    """Begin a stream: an error before the first message is an answer of its own.

    Raises:
        ServerError: the server refuses.
        ProblemError: the caller has left, or the bridge ends.
    """
    parts = _framed(messages, framing)
    first = asyncio.create_task(anext(parts, None))
    try:
        async with presence(request.receive, ending) as present:
            is_there = await present.wait_for(first, BEGIN_SECONDS)
        is_empty = is_there and first.result() is None
    except BaseException:
        await ended(first)
        await parts.aclose()
        raise
    if is_empty and framing.is_event_stream:
        # Any other answer would let an EventSource ask again for what is over.
        return Response(status_code=204)
    headers = {
        "Content-Type": framing.media_type,
        "Cache-Control": "no-store",
        # nginx would hold events back until its buffer is full.
        "X-Accel-Buffering": "no",
    }
    return PartsResponse(
        ending,
        parts,
        headers,
        first=first,
        problem_part=framing.problem,
        sign_of_life=framing.sign_of_life,
    )


async def _framed(messages: AsyncGenerator[Message], framing: Framing) -> AsyncGenerator[bytes]:
    async with aclosing(messages):
        async for message in messages:
            yield framing.message(message)
