"""Streams that go on where they broke off, whatever the transport: when to call again, and with what."""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hidream.errors import DataLossError, QueueFullError, ServerError, UnavailableError

logger = logging.getLogger(__name__)

DEFAULT_RECONNECT_SECONDS = 300.0
MAX_RETRIES = 2
_FIRST_DELAY_SECONDS = 0.1
_MAX_DELAY_SECONDS = 5.0

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")
_ItemT = TypeVar("_ItemT")


@dataclass(frozen=True, slots=True)
class ReconnectPolicy:
    """What a stream does when its connection is lost.

    Attributes:
        timeout_seconds: deadline of the whole stream, from its start, over all reconnections; None is none.
        reconnect_seconds: it gives up when it gets no answer for this long. 0 gives up at once.
        on_connection_lost: called with the error each time, before the next attempt.
    """

    timeout_seconds: float | None = None
    reconnect_seconds: float = DEFAULT_RECONNECT_SECONDS
    on_connection_lost: Callable[[ServerError], None] | None = None


DEFAULT_POLICY = ReconnectPolicy()


class FirstAnswer:
    """The wait for the first answer of a call: a deadline, and two retries where the server asks for them."""

    def __init__(self, timeout_seconds: float | None) -> None:
        self._deadline_seconds = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._num_retries = 0

    def remaining_seconds(self) -> float | None:
        """Return how long the next try may take; None for no limit."""
        if self._deadline_seconds is None:
            return None
        return max(0.0, self._deadline_seconds - time.monotonic())

    def retry_delay_seconds(self, error: ServerError) -> float:
        """Take the error that ended a try, and give how long to wait before the next.

        Raises:
            ServerError: the server did not ask for another try, or two have failed, or no time is left.
        """
        delay_seconds: float | None = error.retry_after_seconds
        if not isinstance(error, UnavailableError) or delay_seconds is None:
            raise error
        remaining_seconds = self.remaining_seconds()
        is_too_late = remaining_seconds is not None and delay_seconds >= remaining_seconds
        if is_too_late or self._num_retries == MAX_RETRIES:
            raise error
        self._num_retries += 1
        logger.info("trying again in %.1f s: %s", delay_seconds, error)
        return delay_seconds


class ResumableStream(ABC, Generic[_RequestT, _ResponseT, _ItemT]):
    """One stream over any number of calls.

    Each call starts after what the one before has brought. A server that does not even answer the
    first call is an error at once, unless it says when to try again: it may be the wrong address.

    Attributes:
        job_id: what the stream is about, as far as it is about one job; empty before that is known.
        request_id: by which the same call goes on with a job that stops without it; empty for other jobs.
        held_seconds: how long the server holds such a job when the connection is lost.
    """

    job_id = ""
    request_id = ""
    held_seconds = 0.0

    def __init__(self, policy: ReconnectPolicy) -> None:
        self._policy = policy
        self._first_answer = FirstAnswer(policy.timeout_seconds)
        self._is_connected = False
        self._lost_seconds: float | None = None
        self._delay_seconds = _FIRST_DELAY_SECONDS

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing more is to come."""

    @property
    def is_lost(self) -> bool:
        """Whether the connection was lost, and no call has been answered since."""
        return self._lost_seconds is not None

    @abstractmethod
    def request(self) -> _RequestT:
        """The request of the next call."""

    @abstractmethod
    def read(self, response: _ResponseT) -> _ItemT | None:
        """Take the next response, and return what it brings to the caller, if anything."""

    @abstractmethod
    def ended(self) -> None:
        """Say that a call has ended with OK; raises StreamError where that is too early."""

    def timeout_seconds(self) -> float | None:
        """The deadline of the next call."""
        return self._first_answer.remaining_seconds()

    def answered(self) -> None:
        """Say that a response has come: the connection stands."""
        self._is_connected = True
        self._lost_seconds = None
        self._delay_seconds = _FIRST_DELAY_SECONDS

    def retry_delay_seconds(self, error: ServerError) -> float:
        """Take the error that ended a call, and give how long to wait before the next.

        An error behind everything that was to come counts for nothing, unless it says that what came is
        damaged.

        Raises:
            ServerError: another call would end in the same way, or no answer came for too long; then it
                names the job and the request id.
        """
        if self.is_over and not isinstance(error, DataLossError):
            return 0.0
        if not self._is_connected:
            return self._first_answer.retry_delay_seconds(error)
        if not isinstance(error, UnavailableError | QueueFullError):
            raise error
        error.followed_job_id = self.job_id
        error.followed_request_id = self.request_id
        error.held_seconds = self.held_seconds
        now_seconds = time.monotonic()
        if self._lost_seconds is None:
            self._lost_seconds = now_seconds
        left_seconds = self._policy.reconnect_seconds - (now_seconds - self._lost_seconds)
        if left_seconds <= 0:
            if self.job_id:
                request = f", request id {self.request_id}" if self.request_id else ""
                error.args = (f"{error} (job {self.job_id}{request})",)
            raise error
        if self._policy.on_connection_lost:
            self._policy.on_connection_lost(error)
        # Random, so that clients which lost one server do not come back in the same moment.
        delay_seconds = self._delay_seconds * random.uniform(0.5, 1.0)
        self._delay_seconds = min(2 * self._delay_seconds, _MAX_DELAY_SECONDS)
        delay_seconds = min(max(delay_seconds, error.retry_after_seconds or 0.0), left_seconds)
        logger.warning("connection lost, trying again in %.1f s: %s", delay_seconds, error)
        return delay_seconds
