"""What a status of gRPC is over HTTP."""

from __future__ import annotations

import json

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from hidream.errors import error_from_status
from hidream_http.problems import Violation, problem_of

# https://cloud.google.com/apis/design/errors#handling_errors
TABLE = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "DATA_LOSS": 500,
    "UNKNOWN": 500,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_has_the_status_of_google_rpc(code: grpc.StatusCode) -> None:
    problem = problem_of(error_from_status(status_pb2.Status(code=code.value[0], message="so")))
    assert (problem.status, problem.code, problem.detail) == (TABLE[code.name], code.name, "so")
    assert problem.title


def test_a_full_queue_says_when_to_try_again_and_what_is_full() -> None:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="full")
    quota = error_details_pb2.QuotaFailure()
    quota.violations.add(subject="alice", description="3 jobs wait", quota_id="max_queued_jobs_per_caller")
    for detail in (quota, error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=100_000_000))):
        status.details.add().Pack(detail)
    answer = problem_of(error_from_status(status)).response()
    assert answer.status_code == 429
    # Never too early.
    assert answer.headers["retry-after"] == "1"
    body = json.loads(bytes(answer.body))
    assert body["violations"] == [{"field": "max_queued_jobs_per_caller", "description": "3 jobs wait"}]
    assert body["retryAfterSeconds"] == 0.1
    assert len(body["details"]) == 2


def test_details_that_the_bridge_does_not_know_are_named() -> None:
    unknown = any_pb2.Any(type_url="type.googleapis.com/of.the.Future", value=b"1")
    status = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], details=[unknown])
    assert problem_of(error_from_status(status)).details == ({"@type": unknown.type_url},)


def test_a_failure_of_the_bridge_shows_nothing_of_it() -> None:
    problem = problem_of(RuntimeError("a secret"))
    assert (problem.status, problem.violations) == (500, tuple[Violation]())
    assert "secret" not in problem.document()
