from __future__ import annotations

import asyncio
from pathlib import Path

import psutil

from hidream_grpc.engine.requests import EngineState
from hidream_grpc.server.app import Service, build
from hidream_grpc.settings import Settings


def test_a_service_that_is_built_has_opened_no_store_and_no_port_and_started_no_process(
    tmp_path: Path,
) -> None:
    this_process = psutil.Process()

    async def built() -> Service:
        children, sockets = set(this_process.children()), set(this_process.net_connections())
        service = build(Settings(data_dir=tmp_path, metrics_port=0, listen="127.0.0.1:0"))
        assert set(this_process.children()) <= children
        assert set(this_process.net_connections()) <= sockets
        return service

    service = asyncio.run(built())
    assert not list(tmp_path.glob("jobs.sqlite*"))
    assert service.jobs.readiness.engine_state is EngineState.STARTING
    assert not service.jobs.readiness.is_ready
