"""What the parts of a server know, read whenever Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.jobs.service import JobService


class Readings(Collector):
    """Reads single values, in the thread that answers Prometheus.

    What is of the whole store, and not of one server, is named `hidream_store_…`: replicas all say the same.
    """

    def __init__(
        self, jobs: JobService, group: RankGroup, controller: Controller, step_limit: StepLimit
    ) -> None:
        self._jobs = jobs
        self._group = group
        self._controller = controller
        self._step_limit = step_limit

    def collect(self) -> Iterator[Metric]:
        """Read everything once."""
        jobs, queue, readiness = self._jobs, self._jobs.queue, self._jobs.readiness
        for name, text, value in (
            ("hidream_store_queued_jobs", "Jobs in the whole store that wait.", jobs.num_queued),
            ("hidream_store_running_jobs", "Jobs in the whole store that run.", jobs.num_running),
            (
                "hidream_store_queue_seconds",
                "Estimated time until the last of the jobs that wait for this server's model starts, if this "
                "server alone ran them all; 0 where none waits, and before the first step of this server.",
                queue.seconds,
            ),
            (
                "hidream_store_oldest_queued_job_seconds",
                "How long the oldest of the jobs that wait for this server's model has waited.",
                queue.oldest_seconds,
            ),
            ("hidream_running_jobs", "Jobs that this server has claimed.", jobs.executor.num_held),
            ("hidream_layout_devices", "Devices of the layout that serves.", self._group.world_size),
            (
                "hidream_max_step_pixels",
                "What one step may hold; less after a lack of memory.",
                self._step_limit.pixels,
            ),
            ("hidream_serving", "1 while health says SERVING.", readiness.is_ready),
            (
                "hidream_job_store_usable",
                "0 while the job store has refused what a job needs for too long.",
                readiness.store_probe.is_usable,
            ),
            (
                "hidream_artifact_store_usable",
                "0 while images could not be stored for too long.",
                readiness.artifact_probe.is_usable,
            ),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("hidream_accepted_jobs_total", "Jobs that this server accepted.", jobs.num_accepted),
            (
                "hidream_rank_restarts_total",
                "Rank processes that were replaced.",
                self._group.num_restarts,
            ),
            (
                "hidream_lost_steps_total",
                "Steps that jobs took again after a loss of ranks.",
                self._controller.num_lost_steps,
            ),
        ):
            yield CounterMetricFamily(name, text, value)
