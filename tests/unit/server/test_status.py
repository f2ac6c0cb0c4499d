from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hidream_grpc import errors
from hidream_grpc.errors import (
    ClaimLostError,
    FieldViolation,
    HiDreamError,
    JobError,
    RankDiedError,
    RequestError,
)
from hidream_grpc.server.status import TABLE, to_status

DETAIL_TYPES = {
    message.DESCRIPTOR.full_name: message
    for message in (
        error_details_pb2.BadRequest,
        error_details_pb2.ErrorInfo,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.QuotaFailure,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RetryInfo,
    )
}

EXAMPLES: dict[type[HiDreamError], HiDreamError] = {
    type(error): error
    for error in (
        errors.UnauthenticatedError("TOKEN_MISSING", "a token is required"),
        errors.InvalidRequestError((FieldViolation("spec.width", "is odd"), FieldViolation("labels", "no"))),
        errors.RequestIdConflictError("r1", "j1"),
        errors.JobNotFoundError("j1"),
        errors.JobNotEndedError("j1"),
        errors.QueueFullError(64, 2.5),
        errors.CallerQueueFullError("alice", 8, 2.5),
        errors.CallerQuotaError("alice", 600, 1000, 12.5),
        errors.StoreUnavailableError(1.0),
        errors.StoreFullError(5.0),
        errors.TooManyReadersError(1000, 1.5),
        errors.CallerStreamLimitError("alice", 200, 3.5),
        errors.ModelNotServedError("dev", ("demo", "full")),
        errors.NotServingError("the model is loading", 2.0),
        errors.ArtifactUnavailableError(5.0, "no such bucket"),
        errors.ImageNotFoundError("j1", 3),
        errors.ImageNotFinishedError("j1", 3),
        errors.ImageDamagedError("j1", 3),
        errors.OffsetOutOfRangeError(11, 10),
        errors.TooBusyForDeadlineError(5.0, 12.5, 7.5),
        errors.DeadlineTooShortError(5.0, 12.5),
        errors.DeadlineExceededError("j1"),
        errors.JobCancelledError("j1"),
        errors.StorageFullError("j1", 12345),
        errors.OutOfDeviceMemoryError("j1"),
        errors.JobInternalError("e1"),
    )
}


def below(error_type: type[HiDreamError]) -> set[type[HiDreamError]]:
    """All errors that are of this type and are not a type of others."""
    children = error_type.__subclasses__()
    return {error_type}.union(*map(below, children)) - {error_type} if children else {error_type}


def details(status: status_pb2.Status) -> dict[str, Any]:
    """The details of a status, by the name of their type."""
    found: dict[str, Message] = {}
    for packed in status.details:
        message = DETAIL_TYPES[packed.TypeName()]()
        assert packed.Unpack(message)
        found[type(message).__name__] = message
    return found


def test_every_error_that_can_reach_a_caller_has_a_row_and_nothing_else_has() -> None:
    assert set(TABLE) == below(RequestError) | below(JobError)
    assert TABLE.keys().isdisjoint({RankDiedError, ClaimLostError})


def test_there_is_an_example_of_every_row_here() -> None:
    assert set(EXAMPLES) == set(TABLE)


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=lambda error: type(error).__name__)
def test_every_status_has_a_code_a_text_and_details(error: HiDreamError) -> None:
    status = to_status(error)
    assert status.code != code_pb2.OK
    assert status.message == str(error)
    assert details(status)


@pytest.mark.parametrize(
    ("error_type", "code", "names"),
    [
        (errors.UnauthenticatedError, "UNAUTHENTICATED", {"ErrorInfo"}),
        (errors.InvalidRequestError, "INVALID_ARGUMENT", {"BadRequest"}),
        (errors.RequestIdConflictError, "ALREADY_EXISTS", {"ResourceInfo"}),
        (errors.JobNotFoundError, "NOT_FOUND", {"ResourceInfo"}),
        (errors.JobNotEndedError, "FAILED_PRECONDITION", {"PreconditionFailure", "ResourceInfo"}),
        (errors.QueueFullError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.CallerQueueFullError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.CallerQuotaError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.TooBusyForDeadlineError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.DeadlineTooShortError, "DEADLINE_EXCEEDED", {"ErrorInfo"}),
        (errors.StoreUnavailableError, "UNAVAILABLE", {"RetryInfo"}),
        (errors.StoreFullError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.TooManyReadersError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.CallerStreamLimitError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "RetryInfo"}),
        (errors.ModelNotServedError, "FAILED_PRECONDITION", {"PreconditionFailure"}),
        (errors.NotServingError, "UNAVAILABLE", {"RetryInfo"}),
        (errors.ArtifactUnavailableError, "UNAVAILABLE", {"RetryInfo"}),
        (errors.ImageNotFoundError, "NOT_FOUND", {"ResourceInfo"}),
        (errors.ImageNotFinishedError, "FAILED_PRECONDITION", {"PreconditionFailure", "ResourceInfo"}),
        (errors.ImageDamagedError, "DATA_LOSS", {"ErrorInfo"}),
        (errors.OffsetOutOfRangeError, "OUT_OF_RANGE", {"BadRequest"}),
        (errors.DeadlineExceededError, "DEADLINE_EXCEEDED", {"ResourceInfo"}),
        (errors.JobCancelledError, "CANCELLED", {"ResourceInfo"}),
        (errors.StorageFullError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "ResourceInfo"}),
        (errors.OutOfDeviceMemoryError, "RESOURCE_EXHAUSTED", {"QuotaFailure", "ResourceInfo"}),
        (errors.JobInternalError, "INTERNAL", {"ErrorInfo"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_each_error_is_told_as_the_contract_says(
    error_type: type[HiDreamError], code: str, names: set[str]
) -> None:
    status = to_status(EXAMPLES[error_type])
    assert code_pb2.Code.Name(status.code) == code
    assert set(details(status)) == names


def test_a_bad_request_names_every_field_and_its_limit() -> None:
    violations = details(to_status(EXAMPLES[errors.InvalidRequestError]))["BadRequest"].field_violations
    assert [(v.field, v.description) for v in violations] == [("spec.width", "is odd"), ("labels", "no")]


@pytest.mark.parametrize(
    ("error_type", "limit", "retry_after_seconds"),
    [(errors.QueueFullError, "max_queued_jobs", 2.5), (errors.TooManyReadersError, "max_streams", 1.5)],
)
def test_a_reached_limit_is_named_with_the_time_to_come_back(
    error_type: type[HiDreamError], limit: str, retry_after_seconds: float
) -> None:
    found = details(to_status(EXAMPLES[error_type]))
    (violation,) = found["QuotaFailure"].violations
    assert violation.subject == violation.quota_id == limit
    assert limit in violation.description
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == retry_after_seconds


@pytest.mark.parametrize(
    ("error_type", "limit", "retry_after_seconds"),
    [
        (errors.CallerQueueFullError, "max_queued_jobs_per_caller", 2.5),
        (errors.CallerQuotaError, "max_pixel_steps_per_minute_per_caller", 12.5),
        (errors.CallerStreamLimitError, "max_streams_per_caller", 3.5),
    ],
)
def test_a_limit_of_the_caller_names_caller_and_limit_with_the_time_to_come_back(
    error_type: type[HiDreamError], limit: str, retry_after_seconds: float
) -> None:
    found = details(to_status(EXAMPLES[error_type]))
    (violation,) = found["QuotaFailure"].violations
    assert (violation.subject, violation.quota_id) == ("alice", limit)
    assert limit in violation.description
    assert found["RetryInfo"].retry_delay.ToTimedelta().total_seconds() == retry_after_seconds


def test_errors_of_a_job_name_the_job() -> None:
    for error in EXAMPLES.values():
        if hasattr(error, "job_id") and not isinstance(error, errors.ImageDamagedError):
            resource = details(to_status(error))["ResourceInfo"]
            assert (resource.resource_type, resource.resource_name) == ("Job", "j1")


def test_a_damaged_image_is_told_by_its_job_and_number() -> None:
    info = details(to_status(EXAMPLES[errors.ImageDamagedError]))["ErrorInfo"]
    assert (info.reason, info.domain) == ("IMAGE_DAMAGED", "hidream.v1")
    assert dict(info.metadata) == {"job_id": "j1", "image_index": "3"}


def test_a_model_that_nobody_serves_is_told_with_those_that_live() -> None:
    failure = details(to_status(EXAMPLES[errors.ModelNotServedError]))["PreconditionFailure"]
    (violation,) = failure.violations
    assert (violation.type, violation.subject) == ("MODEL", "dev")
    assert "demo, full" in violation.description


def test_a_failure_of_ours_tells_an_id_and_nothing_else() -> None:
    status = to_status(EXAMPLES[errors.JobInternalError])
    info = details(status)["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == ("INTERNAL", "hidream.v1", {"error_id": "e1"})


def test_an_error_without_a_row_has_no_status() -> None:
    with pytest.raises(KeyError):
        to_status(RankDiedError((1,), "killed by SIGKILL"))
