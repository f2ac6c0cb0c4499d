"""Errors as OpenAI's API has them: one object with a message, a type, a parameter and a code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

from hidream.errors import FailedPreconditionError, InvalidArgumentError, StreamError
from hidream_http.problems import Problem, problem_of

_SHOULD_RETRY = "x-should-retry"
"""The header by which OpenAI's clients are told whether to try again."""
_CODES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "invalid_api_key",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_exceeded",
}


class InvalidParameterError(Exception):
    """A request that is refused before it is sent on.

    Attributes:
        parameter: the first that is wrong; None for the body as a whole.
        code: what is wrong with it, in a word; None where OpenAI has none.
    """

    def __init__(self, parameter: str | None, message: str, code: str | None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


class UnknownModelError(Exception):
    """No live server generates with the model."""

    def __init__(self, name: str, live_models: Sequence[str]) -> None:
        super().__init__(f"there is no model {name!r}; there are {', '.join(live_models) or 'none'}")


def error_body(error: Exception, parameter_of: Callable[[str], str]) -> dict[str, Any]:
    """The body that says why a request has failed.

    Args:
        error: of the server or of the bridge.
        parameter_of: the name here for a field of the contract.
    """
    return _body(error, _problem_of(error), parameter_of)


def error_response(error: Exception, parameter_of: Callable[[str], str]) -> Response:
    """The whole answer to a request that has failed; arguments as of `error_body`."""
    problem = _problem_of(error)
    headers = problem.response_headers()
    if problem.retry_after_seconds is not None:
        headers["retry-after-ms"] = str(round(1000 * problem.retry_after_seconds))
    elif problem.status == HTTPStatus.TOO_MANY_REQUESTS:
        # Too large for the server, today and later.
        headers[_SHOULD_RETRY] = "false"
    return JSONResponse(_body(error, problem, parameter_of), problem.status, headers)


def _problem_of(error: Exception) -> Problem:
    match error:
        case InvalidParameterError():
            return Problem(HTTPStatus.BAD_REQUEST, str(error))
        case UnknownModelError():
            return Problem(HTTPStatus.NOT_FOUND, str(error))
        case FailedPreconditionError():
            # All that a new job can lack is its model.
            return Problem(HTTPStatus.NOT_FOUND, error.message)
        case StreamError():
            return Problem(HTTPStatus.BAD_GATEWAY, str(error))
        case _:
            return problem_of(error)


def _body(error: Exception, problem: Problem, parameter_of: Callable[[str], str]) -> dict[str, Any]:
    message, parameter, code = problem.detail, None, _CODES.get(problem.status)
    match error:
        case InvalidParameterError():
            parameter, code = error.parameter, error.code
        case InvalidArgumentError() if error.violations:
            parameter, code = parameter_of(error.violations[0].field), "invalid_value"
            # Width and height are one parameter, and may both be wrong in the same way.
            texts = [f"{parameter_of(one.field)}: {one.description}" for one in error.violations]
            message = "; ".join(dict.fromkeys(texts))
        case UnknownModelError() | FailedPreconditionError():
            parameter, code = "model", "model_not_found"
    return {"error": {"message": message, "type": _type_of(problem.status), "param": parameter, "code": code}}


def _type_of(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
