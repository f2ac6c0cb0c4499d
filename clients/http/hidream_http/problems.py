"""Errors as HTTP says them: a status by google.rpc's table, and problem+json (RFC 9457)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import grpc
from google.protobuf import json_format
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hidream.errors import InternalError, InvalidArgumentError, ResourceExhaustedError, ServerError

MEDIA_TYPE = "application/problem+json"

CLIENT_CLOSED_REQUEST = 499

# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
_HTTP_STATUS = {
    grpc.StatusCode.OK: 200,
    grpc.StatusCode.CANCELLED: CLIENT_CLOSED_REQUEST,
    grpc.StatusCode.UNKNOWN: 500,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DATA_LOSS: 500,
}


@dataclass(frozen=True, slots=True)
class Violation:
    """One thing that is wrong with a request: its field, header or limit, and what would be accepted."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request was not answered.

    Attributes:
        status: of HTTP.
        detail: one line for people.
        code: of gRPC, by name; empty where the bridge itself refuses and gRPC has no code for it.
        violations: every one of them.
        retry_after_seconds: when to try again; None where nobody can tell.
        error_id: stands in the log of the server beside the reason; empty where there is none.
        details: of the server's status, each as proto3 JSON.
        headers: that the answer has besides.
    """

    status: int
    detail: str
    code: str = ""
    violations: tuple[Violation, ...] = ()
    retry_after_seconds: float | None = None
    error_id: str = ""
    details: tuple[Mapping[str, Any], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """The status in words."""
        if self.status == CLIENT_CLOSED_REQUEST:
            return "Client Closed Request"
        return HTTPStatus(self.status).phrase

    def document(self) -> str:
        """The problem as JSON; what it quotes may be no text that UTF-8 can write."""
        return json.dumps(self.body(), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()

    def body(self) -> dict[str, Any]:
        """The members of the problem, as RFC 9457 has them, and ours."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.code:
            body["code"] = self.code
        if self.violations:
            body["violations"] = [
                {"field": violation.field, "description": violation.description}
                for violation in self.violations
            ]
        if self.retry_after_seconds is not None:
            body["retryAfterSeconds"] = self.retry_after_seconds
        if self.error_id:
            body["errorId"] = self.error_id
        if self.details:
            body["details"] = list(self.details)
        return body

    def response_headers(self) -> dict[str, str]:
        """The headers that belong to the problem, whatever shape its body has."""
        headers = dict(self.headers)
        if self.retry_after_seconds is not None:
            # Whole seconds are all that HTTP has here, and too early is another refusal.
            headers["Retry-After"] = str(math.ceil(self.retry_after_seconds))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.document(), self.status, self.response_headers(), MEDIA_TYPE)


class ProblemError(Exception):
    """A request that the bridge itself refuses."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


def invalid(*violations: Violation) -> ProblemError:
    """The error of a request that is wrong, with all that is wrong with it."""
    detail = "; ".join(
        f"{violation.field}: {violation.description}" if violation.field else violation.description
        for violation in violations
    )
    return ProblemError(Problem(HTTPStatus.BAD_REQUEST, detail, "INVALID_ARGUMENT", violations))


def problem_of(error: Exception) -> Problem:
    """The problem that an error is, whether the server or the bridge has raised it."""
    match error:
        case ProblemError():
            return error.problem
        case ServerError():
            return _of_server(error)
        case HTTPException():
            return Problem(error.status_code, error.detail, headers=tuple((error.headers or {}).items()))
        case _:
            return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a failure of the bridge; its log says more")


def _of_server(error: ServerError) -> Problem:
    violations: tuple[Violation, ...] = ()
    if isinstance(error, InvalidArgumentError):
        violations = tuple(Violation(one.field, one.description) for one in error.violations)
    elif isinstance(error, ResourceExhaustedError):
        violations = tuple(Violation(one.limit or one.subject, one.description) for one in error.violations)
    return Problem(
        _HTTP_STATUS[error.code],
        error.message or str(error),
        error.code.name,
        violations,
        error.retry_after_seconds,
        error.error_id if isinstance(error, InternalError) else "",
        tuple(_details(error)),
    )


def _details(error: ServerError) -> list[Mapping[str, Any]]:
    shown: list[Mapping[str, Any]] = []
    for detail in error.details.details:
        try:
            shown.append(json_format.MessageToDict(detail))
        except TypeError:
            # A newer server may send what this bridge does not know.
            shown.append({"@type": detail.type_url})
    return shown


async def answer_with_problem(_: Request, error: Exception) -> Response:
    """Answer a request with the error that it ended with."""
    return problem_of(error).response()
