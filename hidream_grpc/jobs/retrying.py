"""Waiting for something, but not for ever."""

from __future__ import annotations

import asyncio
import contextlib


async def wait_at_most(event: asyncio.Event, seconds: float) -> bool:
    """Until the event is set, or the time has passed; returns whether it is set.

    Not asyncio.wait_for: before Python 3.12 that loses a cancellation that comes with the event.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
