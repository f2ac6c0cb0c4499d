"""The tools that every running job needs, the same for all jobs of a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.job import Execution
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.watching.events import JobEvent
from hidream_grpc.traces import RecordSpan


@dataclass(frozen=True, slots=True)
class JobTools:
    """The tools of a running job.

    Attributes:
        chunk_bytes: size of the parts in which images are published.
        publish_to_replicas: called with the events that stand in no row, for readers at other replicas.
        checkpoint_fingerprint: a snapshot of another checkpoint is refused.
        record_span: exports a span; None where nothing is traced.
    """

    store: SqlJobStore
    artifacts: ArtifactStore
    estimator: JobEstimator
    describe_execution: Callable[[], Execution]
    chunk_bytes: int
    publish_to_replicas: Callable[[str, JobEvent], None]
    checkpoint_fingerprint: str
    record_span: RecordSpan | None = None
