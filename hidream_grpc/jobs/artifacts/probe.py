"""Finds out whether the artifact store would take an image now, from the real writes and from probes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hidream_grpc.background import RETRY_SECONDS, keep_doing
from hidream_grpc.errors import ArtifactUnavailableError
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.outage_timer import OutageTimer
from hidream_grpc.jobs.retrying import wait_at_most

logger = logging.getLogger(__name__)

PROBE_SECONDS = 10.0
"""Seconds between two probes while all goes well: a bucket takes money for each request."""


class ArtifactProbe:
    """Notes since when the artifact store fails, and tells it once.

    A write that failed counts until a write succeeds, or until a probe succeeds that began after a whole
    round without such a failure: no probe speaks for images that are refused all the while.

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
        self._has_write_failed = False

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
                self._has_write_failed = True
                self._note_failure(error.reason)
        elif is_write:
            self._has_write_failed = False
            self._note_success()

    async def _probe(self) -> None:
        had_write_failed, self._has_write_failed = self._has_write_failed, False
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
        elif not had_write_failed and not self._has_write_failed:
            self._note_success()

    async def _pause(self) -> None:
        await asyncio.sleep(RETRY_SECONDS)
        if self.failure is None:
            await wait_at_most(self._is_due, PROBE_SECONDS)

    def _note_failure(self, reason: str) -> None:
        self._timer.start()
        if self.failure is None:
            logger.warning("the artifact store is not available: %s; new jobs are refused", reason)
        self.failure = reason

    def _note_success(self) -> None:
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
