"""Every error of this client.

    HiDreamError
    ├── ServerError                     the call ended with a status: `code`, `message`, `details`
    │   ├── InvalidArgumentError        one or more fields are wrong: `violations`
    │   ├── UnauthenticatedError        the server asks for a token that it knows
    │   ├── PermissionDeniedError       the token is not for this
    │   ├── NotFoundError               no such job or image
    │   ├── AlreadyExistsError          the request id was used with another request
    │   ├── FailedPreconditionError     not in this state
    │   ├── ResourceExhaustedError      too much was asked for: `violations`
    │   │   ├── QueueFullError          nothing was accepted; try again after `retry_after_seconds`
    │   │   └── TooBusyForDeadlineError the same, with as long a deadline then as now, or with a longer one
    │   ├── UnavailableError            unreachable, starting or draining: `retry_after_seconds`
    │   ├── DeadlineExceededError       the deadline passed, or is too short for the job
    │   ├── CancelledError              the job was cancelled
    │   ├── UnimplementedError          this version of the server cannot do that
    │   ├── DataLossError               a stored image is damaged: `job_id`, `image_index`
    │   └── InternalError               a failure of the server: `error_id` stands in its log
    ├── NotServingError                 it did not serve in the time given
    ├── AddressError                    the address of the server cannot be understood: `address`
    ├── EventLoopError                  an AsyncClient is used in a second event loop
    └── StreamError                     what arrived is not what was announced
        └── BrokenImageError            an image did not arrive as it was sent: `image_index`

A code without a class of its own is a plain `ServerError`. What each means, and whether to try
again, stands at each RPC in `protos/hidream/v1/image_gen.proto`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

_MessageT = TypeVar("_MessageT", bound=Message)
_STATUS_DETAILS_KEY = "grpc-status-details-bin"
_DEADLINE_LIMIT = "deadline"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field: its path in the request, and what would be accepted."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """One limit that was reached: what it is of, how large it is, and its name."""

    subject: str
    description: str
    limit: str = ""


class HiDreamError(Exception):
    """Base of every error of this client; all of them can be pickled and copied."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        # Made without its constructor, which takes other arguments than the text.
        return _without_constructor, (type(self), *self.args), self.__dict__


def _without_constructor(kind: type[HiDreamError], *args: Any) -> HiDreamError:
    return kind.__new__(kind, *args)


class ServerError(HiDreamError):
    """The call ended with a status other than OK.

    Attributes:
        code: the gRPC status code.
        message: the status's text, for people.
        details: the whole `google.rpc.Status`; without details where the server sent none.
        retry_after_seconds: when to try again; None where the server does not say.
        followed_job_id: the job that was being followed when the connection was lost; empty otherwise.
        followed_request_id: with it as its `request_id` the same `generate` goes on with that job, or
            generates it anew; empty for a job that goes on by itself, which `watch` follows.
        held_seconds: how long the server holds such a job, from when it has noticed.
    """

    followed_job_id = ""
    followed_request_id = ""
    held_seconds = 0.0

    def __init__(self, details: status_pb2.Status) -> None:
        super().__init__(details.message or code_pb2.Code.Name(details.code))
        self.code = _CODES.get(details.code, grpc.StatusCode.UNKNOWN)
        self.message = details.message
        self.details = details
        retry = _detail(details, error_details_pb2.RetryInfo)
        self.retry_after_seconds = retry and retry.retry_delay.ToTimedelta().total_seconds()


class InvalidArgumentError(ServerError):
    """One or more fields of the request are not acceptable; every one of them is listed.

    Attributes:
        violations: the bad fields.
    """

    def __init__(self, details: status_pb2.Status) -> None:
        super().__init__(details)
        bad_request = _detail(details, error_details_pb2.BadRequest) or error_details_pb2.BadRequest()
        self.violations = tuple(
            FieldViolation(violation.field, violation.description)
            for violation in bad_request.field_violations
        )

    @classmethod
    def from_violations(cls, violations: tuple[FieldViolation, ...]) -> InvalidArgumentError:
        """The error of a request that cannot even be written down, so that it was never sent."""
        details = status_pb2.Status(
            code=code_pb2.INVALID_ARGUMENT,
            message="; ".join(f"{violation.field}: {violation.description}" for violation in violations),
        )
        bad_request = error_details_pb2.BadRequest()
        for violation in violations:
            bad_request.field_violations.add(field=violation.field, description=violation.description)
        details.details.add().Pack(bad_request)
        return cls(details)


class UnauthenticatedError(ServerError):
    """The server asks for a bearer token and got none that it knows."""


class PermissionDeniedError(ServerError):
    """The token is known, but does not allow this call."""


class NotFoundError(ServerError):
    """There is no such job or image, or it belongs to another caller."""


class AlreadyExistsError(ServerError):
    """The request id was used with another request."""


class FailedPreconditionError(ServerError):
    """The job is not in a state that allows this, or no live server serves the model asked for."""


class ResourceExhaustedError(ServerError):
    """More was asked for than there is.

    Attributes:
        violations: the limits that were reached.
    """

    def __init__(self, details: status_pb2.Status) -> None:
        super().__init__(details)
        quota = _detail(details, error_details_pb2.QuotaFailure) or error_details_pb2.QuotaFailure()
        self.violations = tuple(
            QuotaViolation(violation.subject, violation.description, violation.quota_id)
            for violation in quota.violations
        )


class QueueFullError(ResourceExhaustedError):
    """The queue is full, too many streams are open, or this caller's share is used up.

    Nothing was accepted: try again later.
    """


class TooBusyForDeadlineError(ResourceExhaustedError):
    """Too many jobs are in front for the images to come before the deadline of the call.

    Nothing was accepted: try again later with as long a deadline, or with a longer one.
    """


class UnavailableError(ServerError):
    """No server answers at the address, or it is starting, recovering or draining."""


class DeadlineExceededError(ServerError):
    """The caller's deadline passed before the job ended; the job was stopped.

    Or it is too short for the job even alone, by the server's measured times: then nothing was accepted.
    """


class CancelledError(ServerError):
    """The job was cancelled before it ended."""


class UnimplementedError(ServerError):
    """This version of the server does not have the method."""


class DataLossError(ServerError):
    """An image was stored and is gone, short or altered; what was received of it must not be used.

    Another try ends in the same way: ask for the image again, with the same seed.

    Attributes:
        job_id: the job whose image it is; empty where the server sent none.
        image_index: which of its images; None where the server sent none.
    """

    def __init__(self, details: status_pb2.Status) -> None:
        super().__init__(details)
        info = _detail(details, error_details_pb2.ErrorInfo) or error_details_pb2.ErrorInfo()
        self.job_id = info.metadata.get("job_id", "")
        index = info.metadata.get("image_index", "")
        self.image_index = int(index) if index.isdecimal() else None


class InternalError(ServerError):
    """A failure of the server.

    Attributes:
        error_id: stands in the server's log beside the reason; empty where the server sent none.
    """

    def __init__(self, details: status_pb2.Status) -> None:
        super().__init__(details)
        info = _detail(details, error_details_pb2.ErrorInfo) or error_details_pb2.ErrorInfo()
        self.error_id = info.metadata.get("error_id", "")


class NotServingError(HiDreamError):
    """The service did not serve in the time given.

    Attributes:
        last_status: the last health that it reported, by name; None when nothing answered.
    """

    def __init__(self, timeout_seconds: float, last_status: str | None, proxy: str | None = None) -> None:
        through = f" through the proxy {proxy}" if proxy else ""
        seen = f"its health is {last_status}" if last_status else f"nothing answers{through}"
        super().__init__(f"not serving after {timeout_seconds:g} s: {seen}")
        self.timeout_seconds = timeout_seconds
        self.last_status = last_status


class AddressError(HiDreamError):
    """The address of a server cannot be understood.

    Attributes:
        address: as it was given.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"address {address!r}: {reason}")
        self.address = address


class EventLoopError(HiDreamError):
    """An AsyncClient that is connected in one event loop was used in another one."""

    def __init__(self) -> None:
        super().__init__(
            "this AsyncClient is connected in another event loop: make one for each loop, or close it there "
            "before it is used here"
        )


class StreamError(HiDreamError):
    """A stream broke its promise: a piece out of place, a wrong SHA-256, an end before the end."""


class BrokenImageError(StreamError):
    """An image did not arrive as it was announced; what was received of it must not be used.

    Attributes:
        image_index: which image of its job.
    """

    def __init__(self, image_index: int, reason: str) -> None:
        super().__init__(f"image {image_index}: {reason}")
        self.image_index = image_index


_ERRORS: dict[int, type[ServerError]] = {
    code_pb2.INVALID_ARGUMENT: InvalidArgumentError,
    code_pb2.UNAUTHENTICATED: UnauthenticatedError,
    code_pb2.PERMISSION_DENIED: PermissionDeniedError,
    code_pb2.NOT_FOUND: NotFoundError,
    code_pb2.ALREADY_EXISTS: AlreadyExistsError,
    code_pb2.FAILED_PRECONDITION: FailedPreconditionError,
    code_pb2.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    code_pb2.UNAVAILABLE: UnavailableError,
    code_pb2.DEADLINE_EXCEEDED: DeadlineExceededError,
    code_pb2.CANCELLED: CancelledError,
    code_pb2.UNIMPLEMENTED: UnimplementedError,
    code_pb2.DATA_LOSS: DataLossError,
    code_pb2.INTERNAL: InternalError,
}


def error_from_status(details: status_pb2.Status) -> ServerError:
    """The exception for a status other than OK."""
    kind = _ERRORS.get(details.code, ServerError)
    if kind is ResourceExhaustedError and _detail(details, error_details_pb2.RetryInfo):
        quota = _detail(details, error_details_pb2.QuotaFailure) or error_details_pb2.QuotaFailure()
        # A subject may be a caller of that name.
        is_late = any(violation.quota_id == _DEADLINE_LIMIT for violation in quota.violations)
        kind = TooBusyForDeadlineError if is_late else QueueFullError
    return kind(details)


def error_from_call(call: grpc.RpcError, proxy: str | None = None) -> ServerError:
    """The exception for a call of either transport that ended with a status other than OK.

    Args:
        call: it becomes the cause of the exception.
        proxy: what leads to the server; a connection that fails there names it.
    """
    error = _error_from_call(call, proxy)
    error.__cause__ = call
    return error


def _error_from_call(call: grpc.RpcError, proxy: str | None) -> ServerError:
    # Both transports raise an error that is the ended call too, which grpc's types do not say.
    assert isinstance(call, grpc.Call | grpc.aio.AioRpcError)
    code, message = call.code(), call.details()
    for key, value in call.trailing_metadata() or ():
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                details = status_pb2.Status.FromString(value)
            except DecodeError:
                continue  # the plain status says enough
            if _CODES.get(details.code) is code:
                return error_from_status(details)
    if proxy and code is grpc.StatusCode.UNAVAILABLE:
        message = f"{message} (through the proxy {proxy})"
    return error_from_status(status_pb2.Status(code=code.value[0], message=message or ""))


def _detail(details: status_pb2.Status, kind: type[_MessageT]) -> _MessageT | None:
    for packed in details.details:
        message = kind()
        if packed.Is(message.DESCRIPTOR) and packed.Unpack(message):
            return message
    return None
