"""What an operator says with signals: SIGTERM and SIGINT to end, SIGHUP to use all devices in full again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable

from hidream_grpc.logs import end_logging

logger = logging.getLogger(__name__)


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

    def on_hangup(self, act: Callable[[], None]) -> None:
        """Do this at every SIGHUP."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)

    def _on_end(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


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
