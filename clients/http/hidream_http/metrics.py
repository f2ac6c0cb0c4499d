"""What Prometheus reads, under `hidream_http_…`. One registry a bridge; nothing global."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The measurements of one bridge."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.running = Gauge(
            "hidream_http_running_requests", "Requests that are being answered.", registry=self.registry
        )
        self._requests = Counter(
            "hidream_http_requests_total",
            "Requests that ended.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "hidream_http_request_seconds",
            "Duration of requests, from their head to the end of their answer.",
            ["method", "route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._sent_bytes = Counter(
            "hidream_http_sent_bytes_total", "Bytes of the bodies of answers.", registry=self.registry
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float, sent_bytes: int) -> None:
        """Count a request that ended.

        Args:
            method: of HTTP.
            route: the template of its path; empty for a path that nothing answers.
            status: of its answer.
            seconds: how long it took.
            sent_bytes: of the body of its answer.
        """
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)
        self._sent_bytes.inc(sent_bytes)


def routes(metrics: Metrics) -> list[BaseRoute]:
    """The route for Prometheus."""

    async def answer(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [Route("/metrics", answer)]
