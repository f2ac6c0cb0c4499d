"""What an operator says with signals: SIGTERM and SIGINT to end, SIGHUP to use all devices in full again."""

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
"""What a start that is ended has for closing its connections."""


class StoppedAtStartError(Exception):
    """The server was told to end before it had started."""


class Signals:
    """The signals of this process, from its making on; belongs to the main thread's event loop.

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
        """Do this at every SIGHUP from now on; before, one has no effect."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)

    async def unless_ended(self, start: Coroutine[Any, Any, None]) -> None:
        """Do a part of the start, whose databases may say nothing.

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
    """End the process after a time at the latest, whatever it waits for then.

    A database or a bucket that does not answer keeps threads busy, for which Python waits at its end. What
    was accepted is in the store, and ranks end with their parent.
    """
    timer = threading.Timer(seconds, _end_now)
    timer.daemon = True
    timer.start()


def _end_now() -> None:
    logger.warning("stopped, without waiting any longer for stores that do not answer")
    end_logging()
    os._exit(0)
