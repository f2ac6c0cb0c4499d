"""What the body of a request must be before anything is read from it."""

from __future__ import annotations

import re
from http import HTTPStatus

from starlette.requests import Request

from hidream_http.problems import Problem, ProblemError

_JSON = re.compile(r"application/(?:[\w.-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


def require_json(request: Request) -> None:
    """Raise a ProblemError unless the body is said to be JSON."""
    # The page of another site can send any other type without being asked.
    if not _JSON.fullmatch(request.headers.get("content-type", "")):
        detail = "Content-Type: application/json is required"
        raise ProblemError(Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail))
