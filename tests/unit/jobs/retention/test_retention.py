from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.errors import ArtifactUnavailableError, StoreUnavailableError
from hidream_grpc.jobs.retention.retention import (
    Removal,
    RemovalReason,
    Retention,
    RetentionLimits,
    RetentionReport,
    choose_removals,
)
from hidream_grpc.jobs.store.records import EndedJob, Usage

NOW = 1_000_000.0
_numbers = itertools.count(1)

ended_jobs = st.lists(
    st.builds(
        EndedJob,
        job_id=st.text("abcdef", min_size=1, max_size=4),
        acceptance_number=st.integers(1, 10**6),
        end_time=st.floats(NOW - 100, NOW + 10),
        image_bytes=st.integers(0, 1000),
    ),
    unique_by=(lambda job: job.job_id, lambda job: job.acceptance_number),
    max_size=30,
)
limits = st.builds(
    RetentionLimits,
    retention_seconds=st.floats(0, 120),
    max_retained_jobs=st.none() | st.integers(0, 20),
    max_retained_bytes=st.none() | st.integers(1, 5000),
)


def job(job_id: str, age_seconds: float, image_bytes: int = 10) -> EndedJob:
    return EndedJob(job_id, next(_numbers), NOW - age_seconds, image_bytes)


def oldest_first(ended: Iterable[EndedJob]) -> list[EndedJob]:
    """The jobs in the order in which the store lists them."""
    return sorted(ended, key=_age)


def _age(ended: EndedJob) -> tuple[float, int]:
    return ended.end_time, ended.acceptance_number


def chosen(ended: Sequence[EndedJob], limits: RetentionLimits, num_read: int = 1000) -> tuple[Removal, ...]:
    """What goes, of so many as were read at once."""
    usage = Usage(len(ended), sum(each.image_bytes for each in ended))
    return choose_removals(oldest_first(ended)[:num_read], usage, limits, NOW)


def is_too_old(ended: EndedJob, limits: RetentionLimits) -> bool:
    return NOW - ended.end_time > limits.retention_seconds


@given(ended_jobs, limits)
def test_what_is_kept_is_young_enough_and_small_enough(
    ended: list[EndedJob], limits: RetentionLimits
) -> None:
    gone = {removal.job for removal in chosen(ended, limits)}
    kept = [each for each in ended if each not in gone]
    assert not any(is_too_old(each, limits) for each in kept)
    if limits.max_retained_jobs is not None:
        assert len(kept) <= limits.max_retained_jobs
    if limits.max_retained_bytes is not None:
        assert sum(each.image_bytes for each in kept) <= limits.max_retained_bytes


@given(ended_jobs, limits)
def test_no_job_goes_without_its_reason(ended: list[EndedJob], limits: RetentionLimits) -> None:
    removals = chosen(ended, limits)
    retained_bytes = sum(each.image_bytes for each in ended)
    for number, removal in enumerate(removals):
        assert is_too_old(removal.job, limits) == (removal.reason is RemovalReason.AGE)
        if removal.reason is RemovalReason.NUMBER:
            assert limits.max_retained_jobs is not None
            assert len(ended) - number > limits.max_retained_jobs
        elif removal.reason is RemovalReason.BYTES:
            assert limits.max_retained_bytes is not None
            assert retained_bytes > limits.max_retained_bytes
        retained_bytes -= removal.job.image_bytes


@given(ended_jobs, limits)
def test_jobs_go_once_and_oldest_first_and_none_before_an_older_one(
    ended: list[EndedJob], limits: RetentionLimits
) -> None:
    gone = [removal.job for removal in chosen(ended, limits)]
    assert gone == oldest_first(ended)[: len(gone)]


@given(ended_jobs, limits, st.integers(1, 5))
def test_however_few_are_read_at_once_the_same_jobs_go(
    ended: list[EndedJob], limits: RetentionLimits, num_read: int
) -> None:
    kept = list(ended)
    gone: list[Removal] = []
    while removals := chosen(kept, limits, num_read):
        gone += removals
        kept = [each for each in kept if each not in {removal.job for removal in removals}]
    assert tuple(gone) == chosen(ended, limits)


@given(ended_jobs, limits)
def test_after_a_removal_nothing_more_goes(ended: list[EndedJob], limits: RetentionLimits) -> None:
    gone = {removal.job for removal in chosen(ended, limits)}
    assert chosen([each for each in ended if each not in gone], limits) == ()


def test_a_job_is_kept_for_its_whole_time_and_up_to_the_last_byte() -> None:
    exactly = RetentionLimits(retention_seconds=60, max_retained_bytes=20)
    assert chosen([job("a", 60), job("b", 59)], exactly) == ()
    removals = chosen([job("new", 1), job("old", 60.5), job("b", 2, 11), job("c", 3, 0)], exactly)
    assert [(removal.job.job_id, removal.reason.value) for removal in removals] == [
        ("old", "age"),
        ("c", "bytes"),
        ("b", "bytes"),
    ]


class Bench:
    """Retention over jobs that are removed in fact from dictionaries, unless that fails."""

    def __init__(self, limits: RetentionLimits, *ended: EndedJob) -> None:
        self.jobs = {each.job_id: each for each in ended}
        self.files = {each.job_id for each in ended if each.image_bytes}
        self.reports: list[RetentionReport] = []
        self.failures: set[str] = set()
        self.read: set[str] = set()
        self.num_deletions_left: int | None = None
        self.retention = Retention(
            limits, cast(Any, self), cast(Any, self), self.read.__contains__, self.reports.append
        )

    async def ended(self, after: EndedJob | None, limit: int) -> tuple[EndedJob, ...]:
        behind = [each for each in self.jobs.values() if after is None or _age(each) > _age(after)]
        return tuple(oldest_first(behind)[:limit])

    async def usage(self) -> Usage:
        return Usage(len(self.jobs), sum(each.image_bytes for each in self.jobs.values()))

    async def remove(self, job_id: str) -> None:
        if job_id in self.failures:
            raise ArtifactUnavailableError(1.0, "refused")
        self.files.discard(job_id)

    async def delete_ended(self, job_ids: Collection[str]) -> None:
        if self.num_deletions_left is not None:
            if not self.num_deletions_left:
                raise StoreUnavailableError(1.0)
            self.num_deletions_left -= 1
        for job_id in job_ids:
            assert job_id not in self.files, "the files go before the row"
            self.jobs.pop(job_id, None)

    async def sweep(self, now: float = NOW) -> RetentionReport:
        return await self.retention.sweep(now)


async def test_a_sweep_removes_what_goes_and_reports_what_is_left() -> None:
    bench = Bench(
        RetentionLimits(60, None, 25), job("a", 90), job("b", 70), job("c", 30), job("d", 20), job("e", 10)
    )
    report = await bench.sweep()
    assert set(bench.jobs) == {"d", "e"}
    assert report == RetentionReport(2, 20, {RemovalReason.AGE: 2, RemovalReason.BYTES: 1})
    assert bench.reports == [report]
    assert await bench.sweep() == RetentionReport(2, 20, {})


async def test_a_dry_run_keeps_everything_and_says_once_of_each_job_that_it_would_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(RetentionLimits(60, is_dry_run=True), job("a", 90), job("b", 30))
    for now in (NOW, NOW + 1, NOW + 40):
        report = await bench.sweep(now)
        assert report == RetentionReport(2, 20, {})
    assert set(bench.jobs) == {"a", "b"}
    told = Counter(
        (getattr(record, "job_id", ""), getattr(record, "reason", "")) for record in caplog.records
    )
    assert told == {("a", "age"): 1, ("b", "age"): 1}
    assert all("dry run" in record.message for record in caplog.records)


async def test_a_job_whose_images_cannot_be_removed_stays_until_the_next_sweep_and_holds_up_no_other() -> (
    None
):
    bench = Bench(RetentionLimits(60), job("a", 90), job("b", 80), job("c", 70), job("d", 10))
    bench.failures = {"b"}
    report = await bench.sweep()
    assert set(bench.jobs) == {"b", "d"}
    assert report == RetentionReport(2, 20, {RemovalReason.AGE: 2})
    assert bench.reports == [report]
    bench.failures = set()
    assert (await bench.sweep()).num_removed == {RemovalReason.AGE: 1}
    assert set(bench.jobs) == {"d"}


async def test_images_that_cannot_be_removed_count_as_kept_so_that_others_go_in_their_place() -> None:
    bench = Bench(RetentionLimits(3600, 1), job("a", 90), job("b", 80), job("c", 70))
    bench.failures = {"a"}
    await bench.sweep()
    assert set(bench.jobs) == {"a", "c"}
    bench.failures = set()
    assert (await bench.sweep()).num_removed == {RemovalReason.NUMBER: 1}
    assert set(bench.jobs) == {"c"}


async def test_jobs_without_images_go_while_the_artifact_store_is_away() -> None:
    bench = Bench(RetentionLimits(60), job("a", 90), job("b", 80, image_bytes=0))
    bench.failures = {"a", "b"}
    assert (await bench.sweep()).num_removed == {RemovalReason.AGE: 1}
    assert set(bench.jobs) == {"a"}


async def test_a_sweep_that_loses_the_store_counts_what_went_and_leaves_the_rest_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hidream_grpc.jobs.retention.retention.JOBS_OF_A_BATCH", 1)
    monkeypatch.setattr("hidream_grpc.jobs.retention.retention.MAX_JOBS_READ", 1)
    bench = Bench(RetentionLimits(60), job("a", 90), job("b", 80), job("c", 70), job("d", 10))
    bench.num_deletions_left = 1
    with pytest.raises(StoreUnavailableError):
        await bench.sweep()
    assert set(bench.jobs) == {"b", "c", "d"}
    assert bench.reports == [RetentionReport(3, 30, {RemovalReason.AGE: 1})]
    bench.num_deletions_left = None
    assert (await bench.sweep()).num_removed == {RemovalReason.AGE: 2}
    assert set(bench.jobs) == {"d"}


async def test_a_sweep_that_removes_jobs_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(
        RetentionLimits(60, 1), *(job(str(number), 90) for number in range(3)), job("d", 9), job("e", 8)
    )
    for _ in range(2):
        await bench.sweep()
    (record,) = caplog.records
    assert record.message == "removed 4 old jobs"
    assert (getattr(record, "age", 0), getattr(record, "number", 0)) == (3, 1)


async def test_an_artifact_store_that_fails_for_many_jobs_is_one_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench(RetentionLimits(60), *(job(str(number), 90) for number in range(20)))
    bench.failures = set(bench.jobs)
    for _ in range(3):
        await bench.sweep()
    (record,) = caplog.records
    # The warning is the artifact store's own, whatever fails by it.
    assert record.levelno == logging.INFO


async def test_a_job_that_is_read_stays_until_its_readers_have_gone() -> None:
    bench = Bench(RetentionLimits(60), job("a", 90), job("b", 80))
    bench.read.add("a")
    assert (await bench.sweep()).num_removed == {RemovalReason.AGE: 1}
    assert set(bench.jobs) == {"a"}
    bench.read.clear()
    await bench.sweep()
    assert not bench.jobs


async def test_a_sweep_goes_on_until_all_that_goes_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hidream_grpc.jobs.retention.retention.MAX_JOBS_READ", 2)
    bench = Bench(RetentionLimits(60), *(job(str(number), 90) for number in range(5)))
    assert (await bench.sweep()).num_removed == {RemovalReason.AGE: 5}
