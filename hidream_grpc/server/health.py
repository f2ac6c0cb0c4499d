"""The service grpc.health.v1: Check, Watch, and List, which the library leaves out."""

from __future__ import annotations

from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2

from hidream.v1 import image_gen_pb2
from hidream_grpc.background import BackgroundTasks

IMAGE_GEN = image_gen_pb2.DESCRIPTOR.services_by_name["ImageGen"].full_name
_Status = health_pb2.HealthCheckResponse.ServingStatus
READINESS = ("", IMAGE_GEN)
# A server whose ranks load or recover is alive: restarting it would only lose time.
LIVENESS = "liveness"


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc]
    """Readiness under the empty name and the service's; liveness under a name of its own.

    It starts as not ready.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changes = BackgroundTasks()
        self._is_draining = False
        self.mark_ready(False)

    def mark_draining(self) -> None:
        """Say that requests are not taken any more; `mark_ready` has no effect from now on."""
        self._is_draining = True
        self.mark_ready(False)

    def mark_ready(self, is_ready: bool) -> None:
        """Say whether requests are taken; watchers receive the changes in the order of the calls."""
        self._changes.start(self._set_ready(is_ready and not self._is_draining), "changing the health status")

    async def _set_ready(self, is_ready: bool) -> None:
        for service in READINESS:
            await self.set(service, _Status.SERVING if is_ready else _Status.NOT_SERVING)
        await self.set(LIVENESS, _Status.SERVING)

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        """All services and their status."""
        response = health_pb2.HealthListResponse()
        for service in (*READINESS, LIVENESS):
            check = await self.Check(health_pb2.HealthCheckRequest(service=service), context)
            response.statuses[service].status = check.status
        return response
