"""The signals of an operator: SIGTERM and SIGINT to end, SIGHUP to use all devices in full again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from hidream_grpc.logs import end_logging

logger = logging.getLogger(__name__)

END_OF_START_SECONDS = 1.0
"""Time that a start which is ended has for closing its connections."""


class StoppedAtStartError(Exception):
    """A signal to end came before the server had started."""


class Signals:
    """The signals of this process, from when it is made; belongs to the main thread's event loop.

    Attributes:
        first: is set by the first SIGTERM or SIGINT.
        second: is set by the second one.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end)
        self.on_hangup(_do_nothing)

    def on_hangup(self, act: Callable[[], None]) -> None:
        """Call this at every SIGHUP; before it is set, a SIGHUP has no effect."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)

    async def unless_ended(self, start: Coroutine[Any, Any, None]) -> None:
        """Run a part of the start, during which a database may not answer.

        Raises:
            StoppedAtStartError: a signal to end came before it was done; the process ends soon, in any case.
        """
        starting = asyncio.create_task(start)
        first_signal = asyncio.create_task(self.first.wait())
        await asyncio.wait((starting, first_signal), return_when=asyncio.FIRST_COMPLETED)
        first_signal.cancel()
        if starting.done():
            return starting.result()
        end_within(END_OF_START_SECONDS)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        raise StoppedAtStartError

    def _on_end(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _do_nothing() -> None:
    pass


def end_within(seconds: float) -> None:
    """End the process after this time at the latest, even if it waits for something then.

    A database or a bucket that does not answer keeps threads busy, for which Python waits at its end. Nothing
    is lost: jobs that were accepted are in the store, and ranks end with their parent.
    """
    timer = threading.Timer(seconds, _end_now)
    timer.daemon = True
    timer.start()


def _end_now() -> None:
    logger.warning("stopped, without waiting any longer for stores or ranks that do not answer")
    end_logging()
    os._exit(0)
