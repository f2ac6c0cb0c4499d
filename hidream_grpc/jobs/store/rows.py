"""Turns jobs into rows, and rows into jobs."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from sqlalchemy import Row

from hidream_grpc import errors
from hidream_grpc.errors import HiDreamError, JobInternalError
from hidream_grpc.jobs.job import (
    CancelReason,
    Execution,
    Job,
    JobStage,
    JobState,
    Progress,
    StoredImage,
    StoredSnapshot,
    Submission,
    Timings,
    claim_sequence,
)
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.traces import TraceContext

logger = logging.getLogger(__name__)

ERROR_ID_DIGITS = 12
NOTHING_KNOWN = GenerationParameters(
    prompt="", width=0, height=0, num_inference_steps=0, guidance_scale=0.0, seed=0
)
"""The parameters of a job whose row cannot be read."""

_KEPT_ERRORS: Mapping[str, type[HiDreamError]] = {
    error_type.__name__: error_type
    for error_type in (
        errors.DeadlineExceededError,
        errors.JobCancelledError,
        errors.JobInternalError,
        errors.NotServingError,
        errors.OutOfDeviceMemoryError,
        errors.StorageFullError,
    )
}
"""The errors that a job may end with. Their constructors take facts, attributes of the same names."""


@dataclass(frozen=True, slots=True)
class _ErrorDocument:
    name: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _ProgressDocument:
    """The fields of a job that no query needs; a new field needs a default, for the rows that lack it."""

    stage: JobStage | None = None
    execution: Execution | None = None
    progress: Progress | None = None
    timings: Timings = field(default_factory=Timings)
    images: tuple[StoredImage, ...] = ()
    error: _ErrorDocument | None = None
    start_time: float | None = None
    started_sequence: int = 0
    last_sequence: int = 0
    snapshot: StoredSnapshot | None = None


_progress_decoder = msgspec.json.Decoder(_ProgressDocument)
_submission_decoder = msgspec.json.Decoder(Submission)
_trace_decoder = msgspec.json.Decoder(TraceContext)


def new_row(job: Job) -> dict[str, Any]:
    """All columns of a job that is added, but for its number."""
    submission = job.submission
    return {
        "job_id": job.job_id,
        "owner": job.owner,
        "request_id": submission.request_id,
        "request_digest": submission.request_digest,
        "caller": submission.caller,
        "priority": submission.priority,
        "create_time": job.create_time,
        "deadline_time": job.deadline_time,
        "submission": _json(submission),
        "claim_number": job.claim_number,
        "model_fingerprint": job.model_fingerprint,
        "trace": None if job.trace is None else _json(job.trace),
        **changed_columns(job),
    }


def submission_column(job: Job) -> dict[str, Any]:
    """The column that holds the submission, which never changes."""
    return {"submission": _json(job.submission)}


def changed_columns(job: Job) -> dict[str, Any]:
    """The columns that change as a job runs and ends; the store alone changes the others."""
    return {
        "state": job.state,
        "end_time": job.end_time,
        "image_bytes": sum(image.size_bytes for image in job.images),
        "progress_document": _json(
            _ProgressDocument(
                stage=job.stage,
                execution=job.execution,
                progress=job.progress,
                timings=job.timings,
                images=job.images,
                error=None if job.error is None else _error_document(job.error),
                start_time=job.start_time,
                started_sequence=job.started_sequence,
                last_sequence=job.last_sequence,
                snapshot=job.snapshot,
            )
        ),
    }


def job_of(row: Row[Any]) -> Job:
    """The job of a row of the table `jobs`.

    A row that cannot be read, because a newer version of the service or a hand wrote it, gives a job that
    FAILED. The log says why, once, with the error id that callers get.
    """
    try:
        return _read(row)
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError) as error:
        return _unreadable(row, error)


def failed_columns(job: Job, error: JobInternalError, now: float) -> dict[str, Any]:
    """The columns that end an unclaimed job whose row cannot be read; counts as a claim of its own."""
    document = _ProgressDocument(error=_error_document(error), last_sequence=job.last_sequence)
    return {
        "state": JobState.FAILED,
        "end_time": max(now, job.create_time),
        "progress_document": _json(document),
        "replica_id": None,
        "cancel_reason": None,
        "claim_number": job.claim_number + 1,
    }


def _unreadable(row: Row[Any], reason: Exception) -> Job:
    error = _kept_error(row)
    if error is None:
        # The same id at every replica, and after a restart: the row is read again and again.
        digest = hashlib.sha256(f"{row.job_id} {row.progress_document} {row.submission} {row.state}".encode())
        error = JobInternalError(digest.hexdigest()[:ERROR_ID_DIGITS])
        _log_once(row.job_id, error.error_id, str(reason))
    try:
        submission = _submission_decoder.decode(row.submission)
    except msgspec.MsgspecError:
        submission = Submission(NOTHING_KNOWN, row.request_id, row.caller)
    return Job(
        job_id=row.job_id,
        submission=submission,
        create_time=row.create_time,
        state=JobState.FAILED,
        error=error,
        end_time=row.end_time or row.create_time,
        owner=row.owner,
        claim_number=row.claim_number,
        last_sequence=claim_sequence(row.claim_number + (row.end_time is None), 1),
        is_unreadable=True,
        trace=_trace_of(row),
    )


def _kept_error(row: Row[Any]) -> JobInternalError | None:
    """The error that the job was ended with when its row was found unreadable before."""
    try:
        document = _progress_decoder.decode(row.progress_document).error
        error = None if document is None else _error_of(document)
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError):
        return None
    return error if isinstance(error, JobInternalError) else None


@functools.lru_cache(maxsize=1024)
def _log_once(job_id: str, error_id: str, reason: str) -> None:
    facts = {"job_id": job_id, "error_id": error_id}
    logger.error("a job failed because its row cannot be read: %s", reason, extra=facts)


def _read(row: Row[Any]) -> Job:
    document = _progress_decoder.decode(row.progress_document)
    if any(image.chunk_bytes < 1 for image in document.images):
        raise ValueError("an image is in pieces of no bytes")
    return Job(
        job_id=row.job_id,
        submission=_submission_decoder.decode(row.submission),
        create_time=row.create_time,
        state=JobState(row.state),
        stage=document.stage,
        execution=document.execution,
        progress=document.progress,
        timings=document.timings,
        images=document.images,
        error=None if document.error is None else _error_of(document.error),
        start_time=document.start_time,
        end_time=row.end_time,
        owner=row.owner,
        claim_number=row.claim_number,
        started_sequence=document.started_sequence,
        last_sequence=document.last_sequence,
        deadline_time=row.deadline_time,
        cancel_reason=None if row.cancel_reason is None else CancelReason(row.cancel_reason),
        snapshot=document.snapshot,
        trace=_trace_of(row),
    )


def _trace_of(row: Row[Any]) -> TraceContext | None:
    """The span of a job; None where its row has none, or one that cannot be read: no job fails by that."""
    try:
        return None if row.trace is None else _trace_decoder.decode(row.trace)
    except msgspec.MsgspecError:
        return None


def label_digest(key: str, value: str) -> str:
    """The digest that a label is found by."""
    return hashlib.sha256(_json((key, value)).encode()).hexdigest()


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _error_document(error: HiDreamError) -> _ErrorDocument:
    names = inspect.signature(_KEPT_ERRORS[type(error).__name__]).parameters
    return _ErrorDocument(type(error).__name__, {name: getattr(error, name) for name in names})


def _error_of(document: _ErrorDocument) -> HiDreamError:
    return _KEPT_ERRORS[document.name](**document.facts)
