from __future__ import annotations

from hidream_grpc.jobs.retention.retention import RemovalReason, RetentionReport
from hidream_grpc.server.metrics import Metrics


def test_retention_shows_what_it_left_and_counts_what_it_removed_by_reason() -> None:
    metrics = Metrics()

    def removed(reason: str) -> float | None:
        return metrics.registry.get_sample_value("hidream_removed_jobs_total", {"reason": reason})

    assert (removed("age"), removed("bytes")) == (0, 0)
    metrics.observe_retention(RetentionReport(9, 5000, {RemovalReason.AGE: 2}))
    metrics.observe_retention(RetentionReport(7, 4000, {RemovalReason.AGE: 1, RemovalReason.BYTES: 1}))
    assert (removed("age"), removed("bytes")) == (3, 1)
    assert metrics.registry.get_sample_value("hidream_retained_jobs") == 7
    assert metrics.registry.get_sample_value("hidream_retained_bytes") == 4000
