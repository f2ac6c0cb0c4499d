"""The one table from our errors to gRPC statuses with details. A test fails when an error has no row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hidream_grpc import errors

DOMAIN = "hidream.v1"


@dataclass(frozen=True, slots=True)
class _Row:
    """The status of one error type: its code, and a function that builds the details."""

    code: int
    details: Callable[[Any], list[Message]]


def _bad_request(error: errors.InvalidRequestError) -> list[Message]:
    violation_type = error_details_pb2.BadRequest.FieldViolation
    violations = [violation_type(field=v.field, description=v.description) for v in error.violations]
    return [error_details_pb2.BadRequest(field_violations=violations)]


def _bad_offset(error: errors.OffsetOutOfRangeError) -> list[Message]:
    violation = error_details_pb2.BadRequest.FieldViolation(field="offset", description=str(error))
    return [error_details_pb2.BadRequest(field_violations=[violation])]


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _quota(
    limit: str, error: errors.HiDreamError, caller: str | None = None
) -> error_details_pb2.QuotaFailure:
    subject = limit if caller is None else caller
    violation = error_details_pb2.QuotaFailure.Violation(
        subject=subject, description=str(error), quota_id=limit
    )
    return error_details_pb2.QuotaFailure(violations=[violation])


def _job(job_id: str, error: errors.HiDreamError) -> error_details_pb2.ResourceInfo:
    return error_details_pb2.ResourceInfo(resource_type="Job", resource_name=job_id, description=str(error))


def _not_ended(error: errors.JobNotEndedError) -> list[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="JOB_ENDED", subject=error.job_id, description=str(error)
    )
    return [error_details_pb2.PreconditionFailure(violations=[violation]), _job(error.job_id, error)]


def _not_finished(error: errors.ImageNotFinishedError) -> list[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="IMAGE_FINISHED", subject=error.job_id, description=str(error)
    )
    return [error_details_pb2.PreconditionFailure(violations=[violation]), _job(error.job_id, error)]


def _not_served(error: errors.ModelNotServedError) -> list[Message]:
    violation = error_details_pb2.PreconditionFailure.Violation(
        type="MODEL", subject=error.model, description=str(error)
    )
    return [error_details_pb2.PreconditionFailure(violations=[violation])]


def _too_short(error: errors.DeadlineTooShortError) -> list[Message]:
    metadata = {"earliest_seconds": f"{error.earliest_seconds:.3f}"}
    return [error_details_pb2.ErrorInfo(reason="DEADLINE_TOO_SHORT", domain=DOMAIN, metadata=metadata)]


def _damaged(error: errors.ImageDamagedError) -> list[Message]:
    metadata = {"job_id": error.job_id, "image_index": str(error.index)}
    return [error_details_pb2.ErrorInfo(reason="IMAGE_DAMAGED", domain=DOMAIN, metadata=metadata)]


def _unauthenticated(error: errors.UnauthenticatedError) -> list[Message]:
    return [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]


def _internal(error: errors.JobInternalError) -> list[Message]:
    metadata = {"error_id": error.error_id}
    return [error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata=metadata)]


TABLE: dict[type[errors.HiDreamError], _Row] = {
    errors.UnauthenticatedError: _Row(code_pb2.UNAUTHENTICATED, _unauthenticated),
    errors.InvalidRequestError: _Row(code_pb2.INVALID_ARGUMENT, _bad_request),
    errors.RequestIdConflictError: _Row(code_pb2.ALREADY_EXISTS, lambda e: [_job(e.job_id, e)]),
    errors.JobNotFoundError: _Row(code_pb2.NOT_FOUND, lambda e: [_job(e.job_id, e)]),
    errors.JobNotEndedError: _Row(code_pb2.FAILED_PRECONDITION, _not_ended),
    errors.QueueFullError: _Row(
        code_pb2.RESOURCE_EXHAUSTED,
        lambda e: [_quota("max_queued_jobs", e), _retry(e.retry_after_seconds)],
    ),
    errors.CallerQueueFullError: _Row(
        code_pb2.RESOURCE_EXHAUSTED,
        lambda e: [_quota("max_queued_jobs_per_caller", e, e.caller), _retry(e.retry_after_seconds)],
    ),
    errors.CallerQuotaError: _Row(
        code_pb2.RESOURCE_EXHAUSTED,
        lambda e: [
            _quota("max_pixel_steps_per_minute_per_caller", e, e.caller),
            _retry(e.retry_after_seconds),
        ],
    ),
    errors.StoreUnavailableError: _Row(code_pb2.UNAVAILABLE, lambda e: [_retry(e.retry_after_seconds)]),
    errors.StoreFullError: _Row(
        code_pb2.RESOURCE_EXHAUSTED, lambda e: [_quota("job_store", e), _retry(e.retry_after_seconds)]
    ),
    errors.TooManyReadersError: _Row(
        code_pb2.RESOURCE_EXHAUSTED,
        lambda e: [_quota("max_streams", e), _retry(e.retry_after_seconds)],
    ),
    errors.CallerStreamLimitError: _Row(
        code_pb2.RESOURCE_EXHAUSTED,
        lambda e: [_quota("max_streams_per_caller", e, e.caller), _retry(e.retry_after_seconds)],
    ),
    errors.ModelNotServedError: _Row(code_pb2.FAILED_PRECONDITION, _not_served),
    errors.NotServingError: _Row(code_pb2.UNAVAILABLE, lambda e: [_retry(e.retry_after_seconds)]),
    errors.ArtifactUnavailableError: _Row(code_pb2.UNAVAILABLE, lambda e: [_retry(e.retry_after_seconds)]),
    errors.ImageNotFoundError: _Row(code_pb2.NOT_FOUND, lambda e: [_job(e.job_id, e)]),
    errors.ImageNotFinishedError: _Row(code_pb2.FAILED_PRECONDITION, _not_finished),
    errors.ImageDamagedError: _Row(code_pb2.DATA_LOSS, _damaged),
    errors.OffsetOutOfRangeError: _Row(code_pb2.OUT_OF_RANGE, _bad_offset),
    errors.TooBusyForDeadlineError: _Row(
        code_pb2.RESOURCE_EXHAUSTED, lambda e: [_quota("deadline", e), _retry(e.retry_after_seconds)]
    ),
    errors.DeadlineTooShortError: _Row(code_pb2.DEADLINE_EXCEEDED, _too_short),
    errors.DeadlineExceededError: _Row(code_pb2.DEADLINE_EXCEEDED, lambda e: [_job(e.job_id, e)]),
    errors.JobCancelledError: _Row(code_pb2.CANCELLED, lambda e: [_job(e.job_id, e)]),
    errors.StorageFullError: _Row(
        code_pb2.RESOURCE_EXHAUSTED, lambda e: [_quota("artifact_store", e), _job(e.job_id, e)]
    ),
    errors.OutOfDeviceMemoryError: _Row(
        code_pb2.RESOURCE_EXHAUSTED, lambda e: [_quota("device_memory", e), _job(e.job_id, e)]
    ),
    errors.JobInternalError: _Row(code_pb2.INTERNAL, _internal),
}


def to_status(error: errors.HiDreamError) -> status_pb2.Status:
    """The status that a caller gets for an error of ours.

    Raises:
        KeyError: the error's type has no row; such an error never reaches a caller.
    """
    row = TABLE[type(error)]
    status = status_pb2.Status(code=row.code, message=str(error))
    for detail in row.details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status
