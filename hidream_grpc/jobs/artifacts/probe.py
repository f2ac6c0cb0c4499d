"""Finds out whether the artifact store would take an image now, from the real writes and from probes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from hidream_grpc.background import RETRY_SECONDS, keep_doing
from hidream_grpc.errors import ArtifactUnavailableError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.outage_timer import OutageTimer
from hidream_grpc.jobs.retrying import wait_at_most

logger = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
"""Seconds between two probes while all goes well and no image is stored: a bucket takes money for each."""


class ArtifactProbe:
    """Notes since when the artifact store fails, and logs it once.

    A write that failed counts until a write succeeds, or until a probe succeeds that began when a retry of
    that write would have ended: probes alone prove nothing while images are refused all the while.

    Attributes:
        failure: why images cannot be stored now, for the operator; None while they can.
        is_usable: False once a failure, or a probe without an answer, has lasted too long.

    Args:
        max_outage_seconds: for so long callers do better to wait than to go elsewhere.
        on_change: called when `is_usable` has changed.
    """

    def __init__(
        self, artifacts: ArtifactStore, max_outage_seconds: float, on_change: Callable[[], None]
    ) -> None:
        self.failure: str | None = None
        self.is_usable = True
        self._artifacts = artifacts
        self._max_outage_seconds = max_outage_seconds
        self._on_change = on_change
        # Runs during a failure, and while a probe has no answer: a bucket that hangs says nothing.
        self._timer = OutageTimer(max_outage_seconds, self._note_outage)
        self._is_asking = False
        self._is_due = asyncio.Event()
        self._has_written = False
        self._write_failed_seconds: float | None = None
        self._reads = _ReadFailures()

    async def run(self) -> None:
        """Probe the store until cancelled: now and then, and again and again while it fails."""
        self._artifacts.observe_call = self.note_call
        try:
            await keep_doing("use the artifact store", self._probe, self._pause)
        finally:
            self._timer.stop()

    def note_call(self, is_write: bool, error: ArtifactUnavailableError | None) -> None:
        """Note how a call to the store ended. What has no room answers, and is no failure."""
        if error is not None:
            # Whether it could be written as well is asked at once.
            self._is_due.set()
            if is_write:
                self._write_failed_seconds = time.monotonic()
                self._note_failure(error.reason)
            elif self.failure is None:
                self._reads.note_failure(error.reason)
        elif is_write:
            self._has_written = True
            self._note_success()
        else:
            self._reads.note_success()

    async def _probe(self) -> None:
        begin_seconds = time.monotonic()
        unexplained = self._reads.unlogged
        self._is_due.clear()
        self._is_asking = True
        self._timer.start()
        failure = None
        try:
            await self._artifacts.probe()
        except ArtifactUnavailableError as error:
            failure = error.reason
        finally:
            self._is_asking = False
        if failure is not None:
            self._note_failure(failure)
        elif self._is_retry_over(begin_seconds):
            self._note_success()
            if unexplained is not None:
                self._reads.log()

    def _is_retry_over(self, seconds: float) -> bool:
        """Whether a retry of the last write, if that failed, had ended at a time."""
        if self._write_failed_seconds is None:
            return True
        return seconds - self._write_failed_seconds > self._artifacts.max_call_seconds + 2 * RETRY_SECONDS

    async def _pause(self) -> None:
        await asyncio.sleep(RETRY_SECONDS)
        self._has_written = True
        # A bucket with versions keeps each probe: images that are stored prove as much.
        while self._has_written and self.failure is None and not self._is_due.is_set():
            self._has_written = False
            await wait_at_most(self._is_due, PROBE_SECONDS)

    def _note_failure(self, reason: str) -> None:
        self._timer.start()
        if self.failure is None:
            logger.warning("the artifact store is not available: %s; new jobs are refused", reason)
        self.failure = reason
        self._reads.unlogged = None

    def _note_success(self) -> None:
        self._write_failed_seconds = None
        self._timer.stop()
        if self._is_asking:
            self._timer.start()
        if self.failure is not None:
            self.failure = None
            logger.info("the artifact store is available again")
        if not self.is_usable:
            self.is_usable = True
            self._on_change()

    def _note_outage(self) -> None:
        if self.failure is None:
            self._note_failure(f"no answer for {self._max_outage_seconds:g} s")
        if self.is_usable:
            self.is_usable = False
            logger.info("health says NOT_SERVING until the artifact store is available")
            self._on_change()


class _ReadFailures:
    """Reads, lists and removals that fail although images can be stored: one line in the log for all.

    Attributes:
        unlogged: why the last one failed, while no probe has shown that images can be stored.
    """

    def __init__(self) -> None:
        self.unlogged: str | None = None
        self._is_logged = False

    def note_failure(self, reason: str) -> None:
        """Note a failure while images could be stored."""
        if not self._is_logged:
            self.unlogged = reason

    def note_success(self) -> None:
        """Note that the store gave, listed or removed what was asked for."""
        self.unlogged = None
        if self._is_logged:
            self._is_logged = False
            logger.info("the artifact store can be read again")

    def log(self) -> None:
        """Log the failure, unless it is over or logged."""
        if self.unlogged is not None:
            logger.warning("the artifact store cannot be read: %s", self.unlogged)
            self.unlogged, self._is_logged = None, True
