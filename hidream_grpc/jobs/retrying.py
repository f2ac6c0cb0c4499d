"""Retrying what a store refused: which errors pass, and waits that something can end early.

The interval is `background.RETRY_SECONDS`, as for everything that is retried in this process.
"""

from __future__ import annotations

import asyncio
import contextlib

from hidream_grpc.errors import ArtifactUnavailableError, StoreFullError, StoreUnavailableError

TRANSIENT_ERRORS = (StoreUnavailableError, StoreFullError, ArtifactUnavailableError)
"""Errors that pass without a restart: what was refused is tried again."""


async def wait_at_most(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, or the time has passed; return whether it is set.

    Not asyncio.wait_for: before Python 3.12 that loses a cancellation that comes with the event.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
