"""What Prometheus reads, under `hidream_…`. One registry a server; nothing global."""

from __future__ import annotations

import errno

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.requests import PromptReport, StepReport
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.errors import AddressInUseError, ConfigurationError
from hidream_grpc.jobs.retention.retention import RemovalReason, RetentionReport
from hidream_grpc.jobs.service import JobService

_CALL_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_STEP_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 30)


class Metrics:
    """The server's measurements."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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

        self._retained_jobs = Gauge(
            "hidream_retained_jobs", "Jobs that have ended and are kept.", registry=self.registry
        )
        self._retained_bytes = Gauge(
            "hidream_retained_bytes", "Image bytes of those jobs.", registry=self.registry
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

    def observe_retention(self, report: RetentionReport) -> None:
        """Note what retention left and count what it removed."""
        self._retained_jobs.set(report.num_retained_jobs)
        self._retained_bytes.set(report.retained_bytes)
        for reason, num_removed in report.num_removed.items():
            self._removed_jobs.labels(reason.value).inc(num_removed)

    def watch(
        self, jobs: JobService, group: RankGroup, controller: Controller, step_limit: StepLimit
    ) -> None:
        """Read what these know whenever Prometheus asks."""
        for name, text, read in (
            ("hidream_queued_jobs", "Jobs that wait.", lambda: jobs.num_queued),
            ("hidream_running_jobs", "Jobs that are being drawn.", lambda: jobs.num_running),
            (
                "hidream_rank_restarts",
                "Rank processes replaced since the start.",
                lambda: group.num_restarts,
            ),
            ("hidream_layout_devices", "Devices of the layout that serves.", lambda: group.world_size),
            (
                "hidream_lost_steps",
                "Steps that jobs took again after a loss of ranks.",
                lambda: controller.num_lost_steps,
            ),
            (
                "hidream_max_step_pixels",
                "What one step may hold; less after a lack.",
                lambda: step_limit.pixels,
            ),
            ("hidream_serving", "1 while requests are taken.", lambda: jobs.readiness.is_ready),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

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
