"""What every face of the bridge is given: the connection to the server, and calls on behalf of a caller."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from starlette.requests import HTTPConnection

from hidream.addresses import endpoint
from hidream.certificate_names import FORWARDED_NAME
from hidream.connection import AsyncConnection
from hidream.errors import AddressError, ServerError, error_from_call, error_from_status
from hidream_http.draining import Drain
from hidream_http.problems import Violation, invalid
from hidream_http.settings import SettingError, Settings
from hidream_http.tracing import TRACE_HEADERS, trace_headers

if TYPE_CHECKING:
    # Only the types tell the awaited stub from the other one.
    from hidream.v1.image_gen_pb2_grpc import ImageGenAsyncStub

logger = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 5.0
"""A server that is silent for twice as long is lost; it allows no more frequent pings."""

REQUEST_TIMEOUT = "Request-Timeout"
MAX_TIMEOUT_SECONDS = 30 * 24 * 3600
_RETRY_DELAY = duration_pb2.Duration(seconds=1)
_AUTHORIZATION = "authorization"
_FORWARDED_FOR = "x-forwarded-for"
NAME_OF_CALLER = "hidream_http.name_of_caller"
"""The state of a connection, and so of its requests, that is the name in the certificate of the caller."""

Metadata = tuple[tuple[str, str | bytes], ...]

_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")


@dataclass(frozen=True, slots=True)
class Bridge:
    """One bridge: its settings, and its connection to the server, which all requests share.

    Attributes:
        settings: of this bridge.
        connection: belongs to the event loop of the first call.
        drain: knows when the bridge ends.
    """

    settings: Settings
    connection: AsyncConnection
    drain: Drain

    @classmethod
    def of(cls, settings: Settings, drain: Drain) -> Bridge:
        """The bridge to the server of these settings; it connects at the first call.

        Raises:
            SettingError: the address of the server is none.
        """
        try:
            target, tls = endpoint(settings.server, settings.server_tls)
        except AddressError as error:
            raise SettingError("--server", str(error)) from None
        return cls(settings, AsyncConnection(target, tls, KEEPALIVE_SECONDS), drain)

    @property
    def stub(self) -> ImageGenAsyncStub:
        """The methods of the service, for `Caller.answer` and `Caller.stream`."""
        return self.connection.image_gen

    def caller(self, request: HTTPConnection) -> Caller:
        """The sender of a request, with its token and its deadline.

        Raises:
            ProblemError: a header has a value that cannot be used.
        """
        return Caller(self, _metadata(request), _timeout_seconds(request))


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request of HTTP, as the server is told of it.

    Every call raises the errors of `hidream.errors`, which `hidream_http.problems.problem_of` translates.
    Cancelling the task that waits for one cancels the call.

    Attributes:
        metadata: of every call: the token, the trace, and for whom the bridge calls.
        timeout_seconds: what the caller asked for; None where it did not.
    """

    bridge: Bridge
    metadata: Metadata
    timeout_seconds: float | None

    async def answer(
        self, method: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _ResponseT], message: _RequestT
    ) -> _ResponseT:
        """Call a method with one answer, such as `bridge.stub.GetJob`."""
        timeout_seconds = self.timeout_seconds or self.bridge.settings.timeout_seconds
        try:
            return await method(message, timeout=timeout_seconds, metadata=self.metadata)
        except grpc.RpcError as error:
            raise _server_error(error) from error

    async def stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[_RequestT, _ResponseT], message: _RequestT
    ) -> AsyncGenerator[_ResponseT]:
        """Call a method that streams, such as `bridge.stub.WatchJob`; close the generator to cancel the call.

        The next message is taken from the connection when it is asked for: who reads slowly costs no memory.
        """
        call = method(message, timeout=self.timeout_seconds, metadata=self.metadata)
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise _server_error(error) from error
        finally:
            call.cancel()


def _server_error(call: grpc.RpcError) -> ServerError:
    """The error of a call, without the address of a server that does not answer: that is for our log."""
    error = error_from_call(call)
    if error.code is not grpc.StatusCode.UNAVAILABLE or error.details.details:
        return error
    logger.warning("the server does not answer: %s", error.message)
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="the server does not answer")
    status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=_RETRY_DELAY))
    return error_from_status(status)


def _metadata(request: HTTPConnection) -> Metadata:
    own_headers = trace_headers(request.scope)
    forwarded = (_AUTHORIZATION,) if own_headers is not None else (_AUTHORIZATION, *TRACE_HEADERS)
    pairs = [(name, value) for name in forwarded for value in request.headers.getlist(name)]
    pairs += (own_headers or {}).items()
    hosts = request.headers.getlist(_FORWARDED_FOR)
    if request.client is not None:
        hosts.append(request.client.host)
    if hosts:
        pairs.append((_FORWARDED_FOR, ", ".join(hosts)))
    violations = [
        Violation(name, "has characters other than visible ASCII")
        for name, value in pairs
        if not (value.isascii() and value.isprintable())
    ]
    if violations:
        raise invalid(*violations)
    name = request.scope.get("state", {}).get(NAME_OF_CALLER)
    return tuple(pairs) if name is None else (*pairs, (FORWARDED_NAME, name))


def _timeout_seconds(request: HTTPConnection) -> float | None:
    text = request.headers.get(REQUEST_TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        limits = f"is not a number of seconds, more than 0 and at most {MAX_TIMEOUT_SECONDS}"
        raise invalid(Violation(REQUEST_TIMEOUT, limits))
    return seconds
