"""Whether a server serves (grpc.health.v1), and how to wait until it does."""

from __future__ import annotations

import time
from enum import StrEnum

from grpc_health.v1 import health_pb2

from hidream.errors import DeadlineExceededError, NotServingError, ServerError, UnavailableError

_RETRY_DELAY_SECONDS = 0.2


class HealthStatus(StrEnum):
    """What a server says of one of its services; the names are grpc.health.v1's."""

    UNKNOWN = "UNKNOWN"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    SERVICE_UNKNOWN = "SERVICE_UNKNOWN"


def health_request(service: str) -> health_pb2.HealthCheckRequest:
    """Return the request about one service; the empty name means the server as a whole."""
    return health_pb2.HealthCheckRequest(service=service)


def health_status(response: health_pb2.HealthCheckResponse) -> HealthStatus:
    """Return the status of an answer; a value that this client does not know is UNKNOWN."""
    name = health_pb2.HealthCheckResponse.ServingStatus.Name
    try:
        return HealthStatus(name(response.status))
    except ValueError:
        return HealthStatus.UNKNOWN


class ServingWait:
    """One wait for SERVING, whatever the transport: time left, what was seen, when to try again."""

    def __init__(self, timeout_seconds: float, proxy: str | None) -> None:
        self._timeout_seconds = timeout_seconds
        self._proxy = proxy
        self._deadline_seconds = time.monotonic() + timeout_seconds
        self._last_status: HealthStatus | None = None

    def remaining_seconds(self) -> float:
        """Return how long the next call may take.

        Raises:
            NotServingError: no time is left.
        """
        remaining_seconds = self._deadline_seconds - time.monotonic()
        if remaining_seconds <= 0:
            raise NotServingError(self._timeout_seconds, self._last_status, self._proxy)
        return remaining_seconds

    def is_over(self, response: health_pb2.HealthCheckResponse) -> bool:
        """Take one answer of `Watch`, and say whether the wait is over."""
        self._last_status = health_status(response)
        return self._last_status is HealthStatus.SERVING

    def retry_delay_seconds(self, error: ServerError) -> float:
        """Take the error that ended a watch, and give how long to wait before the next.

        Raises:
            ServerError: another call would end in the same way.
        """
        if not isinstance(error, UnavailableError | DeadlineExceededError):
            raise error
        return min(_RETRY_DELAY_SECONDS, max(0.0, self._deadline_seconds - time.monotonic()))
