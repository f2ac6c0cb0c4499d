"""Checks of requests about jobs that are there; every bad field at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hidream.v1 import image_gen_pb2, job_pb2
from hidream_grpc.errors import (
    FieldViolation,
    ImageNotFinishedError,
    ImageNotFoundError,
    InvalidRequestError,
    OffsetOutOfRangeError,
)
from hidream_grpc.jobs.job import Job, JobState, StoredImage

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_STATES = {job_pb2.JobState.Value(f"JOB_STATE_{state}"): state for state in JobState}


@dataclass(frozen=True, slots=True)
class JobQuery:
    """Which jobs, and which page of them."""

    states: tuple[JobState, ...]
    labels: Mapping[str, str]
    page_size: int = DEFAULT_PAGE_SIZE
    page_token: str = ""


def checked_job_id(request: Any) -> str:
    """The job id of a request that has nothing else."""
    _raise_any(_job_id_violations(request))
    return str(request.job_id)


def checked_watch(request: image_gen_pb2.WatchJobRequest) -> tuple[str, int]:
    """Job id and sequence."""
    violations = _job_id_violations(request)
    if request.after_sequence < 0:
        violations.append(FieldViolation("after_sequence", f"must be 0 or more, is {request.after_sequence}"))
    _raise_any(violations)
    return request.job_id, request.after_sequence


def checked_download(request: image_gen_pb2.DownloadImageRequest) -> tuple[str, int, int]:
    """Job id, image index and offset."""
    violations = _job_id_violations(request)
    for field, value in (("image_index", request.image_index), ("offset", request.offset)):
        if value < 0:
            violations.append(FieldViolation(field, f"must be 0 or more, is {value}"))
    _raise_any(violations)
    return request.job_id, request.image_index, request.offset


def checked_filter(request: image_gen_pb2.WatchJobsRequest) -> JobQuery:
    """States and labels."""
    violations = _state_violations(request)
    _raise_any(violations)
    return JobQuery(tuple(_STATES[state] for state in request.states), dict(request.labels))


def checked_query(request: image_gen_pb2.ListJobsRequest) -> JobQuery:
    """States, labels and page; the store checks the token."""
    violations = _state_violations(request)
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        description = f"must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, is {request.page_size}"
        violations.append(FieldViolation("page_size", description))
    _raise_any(violations)
    states = tuple(_STATES[state] for state in request.states)
    page_size = request.page_size or DEFAULT_PAGE_SIZE
    return JobQuery(states, dict(request.labels), page_size, request.page_token)


def finished_image(job: Job, index: int, offset: int) -> StoredImage:
    """The image that a download asks for.

    Raises:
        ImageNotFoundError: the job draws no such image, or ended without it.
        ImageNotFinishedError: the job is still at it.
        OffsetOutOfRangeError: the image is smaller.
    """
    found = next((image for image in job.images if image.index == index), None)
    if found is None:
        if job.state.has_ended or index >= job.submission.parameters.num_images:
            raise ImageNotFoundError(job.job_id, index)
        raise ImageNotFinishedError(job.job_id, index)
    if offset > found.size_bytes:
        raise OffsetOutOfRangeError(offset, found.size_bytes)
    return found


def _job_id_violations(request: Any) -> list[FieldViolation]:
    return [] if request.job_id else [FieldViolation("job_id", "is required")]


def _state_violations(request: Any) -> list[FieldViolation]:
    return [
        FieldViolation(f"states[{index}]", f"unknown value {state}")
        for index, state in enumerate(request.states)
        if state not in _STATES
    ]


def _raise_any(violations: list[FieldViolation]) -> None:
    if violations:
        raise InvalidRequestError(tuple(violations))
