from __future__ import annotations

import json

import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hidream.errors import BrokenImageError, HiDreamError, error_from_status
from hidream_http.openai_bodies import parameter_of
from hidream_http.openai_errors import error_response


def error(code: int, retry_milliseconds: int | None = None) -> HiDreamError:
    details = status_pb2.Status(code=code, message="why")
    if retry_milliseconds is not None:
        delay = Duration()
        delay.FromMilliseconds(retry_milliseconds)
        details.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return error_from_status(details)


@pytest.mark.parametrize(
    ("raised", "status", "kind", "code"),
    [
        (error(code_pb2.UNAUTHENTICATED), 401, "invalid_request_error", "invalid_api_key"),
        (error(code_pb2.PERMISSION_DENIED), 403, "invalid_request_error", None),
        (error(code_pb2.FAILED_PRECONDITION), 404, "invalid_request_error", "model_not_found"),
        (error(code_pb2.CANCELLED), 499, "invalid_request_error", None),
        (error(code_pb2.RESOURCE_EXHAUSTED), 429, "rate_limit_error", "rate_limit_exceeded"),
        (error(code_pb2.INTERNAL), 500, "server_error", None),
        (error(code_pb2.DATA_LOSS), 500, "server_error", None),
        (BrokenImageError(0, "why"), 502, "server_error", None),
        (error(code_pb2.UNAVAILABLE), 503, "server_error", None),
        (error(code_pb2.DEADLINE_EXCEEDED), 504, "server_error", None),
    ],
    ids=lambda value: str(getattr(value, "code", value))[:30],
)
def test_every_error_has_the_shape_that_clients_of_openai_read(
    raised: HiDreamError, status: int, kind: str, code: str | None
) -> None:
    response = error_response(raised, parameter_of)
    assert response.status_code == status
    (body,) = json.loads(bytes(response.body)).values()
    assert set(body) == {"message", "type", "param", "code"}
    assert "why" in body["message"]
    assert (body["type"], body["code"]) == (kind, code)


def test_a_retry_is_asked_for_only_where_it_can_help() -> None:
    full = error_response(error(code_pb2.RESOURCE_EXHAUSTED, retry_milliseconds=1500), parameter_of)
    assert (full.headers["retry-after"], full.headers["retry-after-ms"]) == ("2", "1500")
    assert "x-should-retry" not in full.headers
    too_large = error_response(error(code_pb2.RESOURCE_EXHAUSTED), parameter_of)
    assert too_large.headers["x-should-retry"] == "false"
