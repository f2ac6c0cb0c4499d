"""What Prometheus reads, under `hidream_…`. One registry a server; nothing global."""

from __future__ import annotations

import errno

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)

from hidream.v1 import server_info_pb2
from hidream_grpc.engine.requests import PromptReport, StepReport
from hidream_grpc.errors import (
    AddressInUseError,
    ConfigurationError,
    JobInternalError,
    OutOfDeviceMemoryError,
    StorageFullError,
)
from hidream_grpc.jobs.job import CancelReason, Job, JobState
from hidream_grpc.jobs.retention.retention import RemovalReason, RetentionReport

_CALL_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_STEP_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 30)
_JOB_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)

FAILURE_REASONS = {
    StorageFullError: "STORAGE_FULL",
    OutOfDeviceMemoryError: "OUT_OF_DEVICE_MEMORY",
    JobInternalError: "INTERNAL",
}
"""The reason of a job that failed, by the type of its error."""
_REASONS = {
    JobState.SUCCEEDED: ("",),
    JobState.FAILED: tuple(FAILURE_REASONS.values()),
    JobState.CANCELLED: tuple(reason.value for reason in CancelReason),
}

_DEADLINE_OUTCOMES = ("met", "missed", "refused")


class Metrics:
    """The measurements of one server; what is of the whole store is named `hidream_store_…`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._calls = Counter(
            "hidream_calls_total", "Calls that ended.", ["method", "code"], registry=self.registry
        )
        self._call_seconds = Histogram(
            "hidream_call_seconds",
            "Duration of calls.",
            ["method", "code"],
            buckets=_CALL_BUCKETS,
            registry=self.registry,
        )
        self._step_seconds = Histogram(
            "hidream_step_seconds",
            "Duration of one denoising step of a batch, on the slowest rank.",
            buckets=_STEP_BUCKETS,
            registry=self.registry,
        )
        self._step_samples = Counter(
            "hidream_step_samples_total", "Samples denoised by one step.", registry=self.registry
        )
        self._snapshot_seconds = Counter(
            "hidream_snapshot_seconds_total",
            "Time that snapshots of running jobs took after steps; compare hidream_step_seconds_sum.",
            registry=self.registry,
        )
        self._prompt_cache_hits = Counter(
            "hidream_prompt_cache_hits_total",
            "Prompts that were encoded already; the empty one not counted.",
            registry=self.registry,
        )
        self._prompt_cache_misses = Counter(
            "hidream_prompt_cache_misses_total",
            "Prompts for which the text encoders ran.",
            registry=self.registry,
        )
        self._jobs = Counter(
            "hidream_jobs_total",
            "Jobs that this server ended, by their last state and why.",
            ["state", "reason"],
            registry=self.registry,
        )
        self._job_seconds = Histogram(
            "hidream_job_seconds",
            "Time of a job from its acceptance to its end, by its last state.",
            ["state"],
            buckets=_JOB_BUCKETS,
            registry=self.registry,
        )
        for state, reasons in _REASONS.items():
            self._job_seconds.labels(state)
            for reason in reasons:
                self._jobs.labels(state, reason)
        self._job_queue_seconds = Histogram(
            "hidream_job_queue_seconds",
            "Time that a job waited before it started, or before it ended without a start.",
            buckets=_JOB_BUCKETS,
            registry=self.registry,
        )
        self._deadlines = Counter(
            "hidream_deadlines_total",
            "Jobs with a deadline, by what became of it: met, missed, or refused at once.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in _DEADLINE_OUTCOMES:
            self._deadlines.labels(outcome)
        self._images = Counter(
            "hidream_images_total", "Images of the jobs that this server ended.", registry=self.registry
        )
        self._retained_jobs = Gauge(
            "hidream_store_retained_jobs",
            "Jobs in the whole store that have ended and are kept.",
            registry=self.registry,
        )
        self._retained_bytes = Gauge(
            "hidream_store_retained_bytes", "Image bytes of those jobs.", registry=self.registry
        )
        self._removed_jobs = Counter(
            "hidream_removed_jobs_total", "Jobs removed by retention.", ["reason"], registry=self.registry
        )
        for reason in RemovalReason:
            self._removed_jobs.labels(reason.value)

    def observe_call(self, method: str, code: str, call_seconds: float) -> None:
        """Count a call that ended."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method, code).observe(call_seconds)

    def observe_step(self, report: StepReport) -> None:
        """Count a denoising step that ended."""
        self._step_seconds.observe(report.step_seconds)
        self._step_samples.inc(report.num_samples)
        self._snapshot_seconds.inc(report.snapshot_seconds)

    def observe_prompts(self, report: PromptReport) -> None:
        """Count the prompts of requests that started."""
        self._prompt_cache_hits.inc(report.num_cache_hits)
        self._prompt_cache_misses.inc(report.num_cache_misses)

    def observe_end(self, job: Job) -> None:
        """Count a job that ended, with its images and the time that it took."""
        self._jobs.labels(job.state, _reason_of(job)).inc()
        self._images.inc(len(job.images))
        if job.deadline_time is not None and job.state is JobState.SUCCEEDED:
            self._deadlines.labels("met").inc()
        elif job.cancel_reason is CancelReason.DEADLINE:
            self._deadlines.labels("missed").inc()
        if not job.is_unreadable:
            self._job_queue_seconds.observe(job.timings.queue_seconds)
            self._job_seconds.labels(job.state).observe(job.timings.total_seconds)

    def observe_late_refusal(self) -> None:
        """Count a request that was refused because it could not end before its deadline."""
        self._deadlines.labels("refused").inc()

    def observe_retention(self, report: RetentionReport) -> None:
        """Note what retention left and count what it removed."""
        self._retained_jobs.set(report.num_retained_jobs)
        self._retained_bytes.set(report.retained_bytes)
        for reason, num_removed in report.num_removed.items():
            self._removed_jobs.labels(reason.value).inc(num_removed)

    def describe_build(self, versions: server_info_pb2.Versions, model: str, device_type: str) -> None:
        """Say which versions run, and what they serve."""
        facts = {
            "version": versions.server,
            "python": versions.python,
            "torch": versions.torch,
            "grpcio": versions.grpcio,
        }
        Info("hidream_build", "What runs, and what it serves.", registry=self.registry).info(
            {**facts, "model": model, "device_type": device_type}
        )

    def serve(self, host: str, port: int) -> int:
        """Answer Prometheus over HTTP from a thread of its own; returns the port.

        Raises:
            AddressInUseError: another process listens there.
            ConfigurationError: the host is not an address of this machine.
        """
        try:
            server, _ = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError("--metrics-port", f"{host}:{port}") from None
            raise ConfigurationError("--metrics-port", f"cannot listen on {host}:{port}: {error}") from None
        return int(server.server_port)


def _reason_of(job: Job) -> str:
    match job.state:
        case JobState.CANCELLED:
            return (job.cancel_reason or CancelReason.REQUESTED).value
        case JobState.FAILED:
            return FAILURE_REASONS.get(type(job.error), "INTERNAL")
        case _:
            return ""
