from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hidream_grpc.errors import (
    DeadlineExceededError,
    HiDreamError,
    JobCancelledError,
    JobError,
    JobInternalError,
    NotServingError,
    OutOfDeviceMemoryError,
    StorageFullError,
)
from hidream_grpc.jobs.job import JobState
from hidream_grpc.jobs.store import rows
from hidream_grpc.jobs.store.rows import job_of, label_digest, new_row
from tests.support.job_stores import new_job

ERRORS: tuple[HiDreamError, ...] = (
    DeadlineExceededError("j1"),
    JobCancelledError("j1"),
    JobInternalError("e1"),
    NotServingError("the server is shutting down", 2.0),
    OutOfDeviceMemoryError("j1"),
    StorageFullError("j1", 12345),
)


def stored(row: dict[str, Any]) -> Any:
    """A row as it is read again."""
    kept = {"cancel_reason": None, "deadline_time": None, **row}
    return SimpleNamespace(**kept)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_why_a_job_ended_is_read_as_it_was_written(error: HiDreamError) -> None:
    job = new_job().ended(JobState.FAILED, 2.0, error)
    read = job_of(stored(new_row(job)))
    assert type(read.error) is type(error)
    assert vars(read.error) == vars(error)
    assert str(read.error) == str(error)


def test_every_error_that_a_job_may_end_with_can_be_kept() -> None:
    kept = set(rows._KEPT_ERRORS.values())
    assert kept == {type(error) for error in ERRORS}
    assert kept.issuperset(JobError.__subclasses__())


def test_a_row_of_an_older_version_that_lacks_fields_can_be_read() -> None:
    assert job_of(stored({**new_row(new_job()), "progress_document": "{}"})).images == ()


def test_labels_are_told_apart_wherever_key_ends_and_value_begins() -> None:
    assert label_digest("a", "bc") != label_digest("ab", "c")
