"""Checks requests about jobs that are there, and names every bad field at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hidream.v1 import image_gen_pb2, job_pb2
from hidream_grpc.errors import (
    FieldViolation,
    ImageNotFinishedError,
    ImageNotFoundError,
    InvalidRequestError,
    JobNotFoundError,
    OffsetOutOfRangeError,
)
from hidream_grpc.jobs.job import Job, JobState, StoredImage
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.jobs.store.page_token import decode_page_token, filter_digest_of
from hidream_grpc.server.checks.violations import invalid_request, label_violations

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

# A text that cannot be an id of ours is put into no query and into no header.
_JOB_ID = re.compile(r"[!-~]{1,128}")
MAX_JOB_ID_CHARACTERS_SHOWN = 32

_STATES = {job_pb2.JobState.Value(f"JOB_STATE_{state}"): state for state in JobState}


@dataclass(frozen=True, slots=True)
class JobQuery:
    """The jobs that a request asks for, and which page of them."""

    states: tuple[JobState, ...]
    labels: Mapping[str, str]
    page_size: int = DEFAULT_PAGE_SIZE
    page_token: str = ""


def checked_job_id(request: Any) -> str:
    """The job id of a request that has no other field."""
    return _job_id(request, [])


def checked_watch(request: image_gen_pb2.WatchJobRequest) -> tuple[str, int]:
    """The job id, and the sequence after which events are asked for."""
    violations = _negative_violations(request, "after_sequence")
    return _job_id(request, violations), request.after_sequence


def checked_download(request: image_gen_pb2.DownloadImageRequest) -> tuple[str, int, int]:
    """The job id, the image index and the offset of a download."""
    violations = _negative_violations(request, "image_index", "offset")
    return _job_id(request, violations), request.image_index, request.offset


def checked_filter(request: image_gen_pb2.WatchJobsRequest, limits: RequestLimits) -> JobQuery:
    """The states and labels that jobs must have."""
    _raise_any(_filter_violations(request, limits))
    return JobQuery(_states(request), dict(request.labels))


def checked_query(request: image_gen_pb2.ListJobsRequest, owner: str, limits: RequestLimits) -> JobQuery:
    """The states and labels that jobs must have, and the page of them."""
    violations = _filter_violations(request, limits)
    states, labels = _states(request), dict(request.labels)
    if request.page_token:
        try:
            decode_page_token(request.page_token, filter_digest_of(owner, frozenset(states), labels))
        except InvalidRequestError as error:
            violations += error.violations
    if not 0 <= request.page_size <= MAX_PAGE_SIZE:
        description = f"must be 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}, is {request.page_size}"
        violations.append(FieldViolation("page_size", description))
    _raise_any(violations)
    return JobQuery(states, labels, request.page_size or DEFAULT_PAGE_SIZE, request.page_token)


def finished_image(job: Job, index: int, offset: int) -> StoredImage:
    """The image that a download asks for.

    Raises:
        ImageNotFoundError: the job has no such image, or ended without it.
        ImageNotFinishedError: the job still generates it.
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


def _job_id(request: Any, violations: list[FieldViolation]) -> str:
    """The job id, where nothing is wrong with the request."""
    job_id: str = request.job_id
    if not job_id:
        violations.insert(0, FieldViolation("job_id", "is required"))
    _raise_any(violations)
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFoundError(ascii(job_id[:MAX_JOB_ID_CHARACTERS_SHOWN]))
    return job_id


def _negative_violations(request: Any, *fields: str) -> list[FieldViolation]:
    values = {field: getattr(request, field) for field in fields}
    return [
        FieldViolation(field, f"must be 0 or more, is {value}")
        for field, value in values.items()
        if value < 0
    ]


def _filter_violations(request: Any, limits: RequestLimits) -> list[FieldViolation]:
    unknown = [
        FieldViolation(f"states[{index}]", f"unknown value {state}")
        for index, state in enumerate(request.states)
        if state not in _STATES
    ]
    return unknown + label_violations(request.labels, limits)


def _states(request: Any) -> tuple[JobState, ...]:
    """The states of a request that are known, each once."""
    return tuple(dict.fromkeys(_STATES[state] for state in request.states if state in _STATES))


def _raise_any(violations: list[FieldViolation]) -> None:
    if violations:
        raise invalid_request(violations)
