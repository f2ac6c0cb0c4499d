"""What a running job works with, on a store of a test."""

from __future__ import annotations

from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.job import Execution
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.traces import RecordSpan
from tests.support.snapshots import CHECKPOINT_FINGERPRINT


def tools_of(store: SqlJobStore, artifacts: ArtifactStore, record_span: RecordSpan | None = None) -> JobTools:
    """The tools of a server that runs jobs of the demo model."""
    capacity = EngineCapacity(max_running_jobs=1, max_step_pixels=1 << 20, num_ranks=1)
    return JobTools(
        store=store,
        artifacts=artifacts,
        estimator=JobEstimator(lambda: capacity),
        describe_execution=lambda: Execution("demo", "FlowMatchLCMScheduler", 3.0, "tp=1"),
        chunk_bytes=1024,
        publish_to_replicas=lambda job_id, event: None,
        checkpoint_fingerprint=CHECKPOINT_FINGERPRINT,
        record_span=record_span,
    )
