from __future__ import annotations

import time
from dataclasses import replace

import pytest

from hidream_grpc.errors import (
    HiDreamError,
    JobError,
    JobInternalError,
    OutOfDeviceMemoryError,
    StorageFullError,
)
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.retention.retention import RemovalReason, RetentionReport
from hidream_grpc.server.info import VERSIONS
from hidream_grpc.server.metrics import FAILURE_REASONS, Metrics
from hidream_grpc.version import SERVER_VERSION
from tests.support.job_stores import new_job, started, with_image


def ended(
    state: JobState, error: HiDreamError | None = None, cancel_reason: CancelReason | None = None
) -> Job:
    job = with_image(started(replace(new_job(), create_time=time.time() - 7)))
    return replace(job.ended(state, time.time() + 100, error), cancel_reason=cancel_reason)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (ended(JobState.SUCCEEDED), ""),
        (ended(JobState.FAILED, StorageFullError("j", 5)), "STORAGE_FULL"),
        (ended(JobState.FAILED, OutOfDeviceMemoryError("j")), "OUT_OF_DEVICE_MEMORY"),
        (ended(JobState.FAILED, JobInternalError("e")), "INTERNAL"),
        (ended(JobState.CANCELLED, None, CancelReason.DEADLINE), "DEADLINE"),
    ],
    ids=lambda value: value or "none" if isinstance(value, str) else value.state,
)
def test_a_job_that_ended_is_counted_by_why_with_its_images_and_seconds(job: Job, reason: str) -> None:
    metrics = Metrics()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(name, labels)

    assert value("hidream_jobs_total", state=job.state, reason=reason) == 0, "a rate needs the first one too"
    metrics.observe_end(job)
    assert value("hidream_jobs_total", state=job.state, reason=reason) == 1
    assert value("hidream_images_total") == 1
    assert value("hidream_job_seconds_sum", state=job.state) == job.timings.total_seconds > 100
    assert value("hidream_job_queue_seconds_sum") == job.timings.queue_seconds >= 7


@pytest.mark.parametrize(
    ("job", "outcome"),
    [
        (replace(ended(JobState.SUCCEEDED), deadline_time=1.0), "met"),
        (replace(ended(JobState.CANCELLED, None, CancelReason.DEADLINE), deadline_time=1.0), "missed"),
        (replace(ended(JobState.CANCELLED, None, CancelReason.REQUESTED), deadline_time=1.0), None),
        (replace(ended(JobState.FAILED, JobInternalError("e")), deadline_time=1.0), None),
        (ended(JobState.SUCCEEDED), None),
    ],
    ids=["met", "missed", "stopped", "failed", "no deadline"],
)
def test_deadlines_are_counted_that_were_met_or_missed(job: Job, outcome: str | None) -> None:
    metrics = Metrics()
    metrics.observe_end(job)
    metrics.observe_late_refusal()
    counted = {
        name: metrics.registry.get_sample_value("hidream_deadlines_total", {"outcome": name})
        for name in ("met", "missed", "refused")
    }
    assert counted == {"met": 0, "missed": 0, "refused": 1} | ({outcome: 1} if outcome else {})


def test_every_error_that_a_job_can_fail_with_has_a_reason() -> None:
    assert set(FAILURE_REASONS) == set(JobError.__subclasses__())


def test_the_build_names_the_version_and_the_process_is_measured() -> None:
    metrics = Metrics()
    metrics.describe_build(VERSIONS, "HiDream-I1-Dev", "npu")
    (build,) = [family for family in metrics.registry.collect() if family.name == "hidream_build"]
    labels = build.samples[0].labels
    assert (labels["version"], labels["model"]) == (SERVER_VERSION, "HiDream-I1-Dev")
    assert metrics.registry.get_sample_value("process_resident_memory_bytes")


def test_retention_shows_what_it_left_and_counts_what_it_removed_by_reason() -> None:
    metrics = Metrics()

    def removed(reason: str) -> float | None:
        return metrics.registry.get_sample_value("hidream_removed_jobs_total", {"reason": reason})

    assert (removed("age"), removed("bytes")) == (0, 0)
    metrics.observe_retention(RetentionReport(9, 5000, {RemovalReason.AGE: 2}))
    metrics.observe_retention(RetentionReport(7, 4000, {RemovalReason.AGE: 1, RemovalReason.BYTES: 1}))
    assert (removed("age"), removed("bytes")) == (3, 1)
    assert metrics.registry.get_sample_value("hidream_store_retained_jobs") == 7
    assert metrics.registry.get_sample_value("hidream_store_retained_bytes") == 4000
