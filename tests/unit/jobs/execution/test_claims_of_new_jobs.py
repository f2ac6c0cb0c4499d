"""When a server that is told of a new job looks at the queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hidream_grpc.engine.requests import Priority
from hidream_grpc.jobs.execution.executor import JobExecutor
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.unit.jobs.service_bench import LIMITS, bench_in, draw, submission, until


@pytest.fixture
def notices() -> Iterator[list[Any]]:
    with patch.object(JobExecutor, "notify", autospec=True, side_effect=JobExecutor.notify) as notify:
        yield notify.call_args_list


@pytest.fixture
def claims() -> Iterator[list[Any]]:
    with patch.object(SqlJobStore, "claim", autospec=True, side_effect=SqlJobStore.claim) as claim:
        yield claim.call_args_list


async def test_a_full_server_looks_at_the_queue_for_none_but_more_urgent_jobs(
    tmp_path: Path, notices: list[Any], claims: list[Any]
) -> None:
    async with bench_in(tmp_path) as bench:
        running = []
        for number in range(LIMITS.max_running_jobs):
            await bench.submit(submission(f"running-{number}"))
            running.append(await bench.take())
        # The claim after the last one finds nothing.
        await until(lambda: len(claims) > LIMITS.max_running_jobs)
        await bench.num_queued()
        num_notices, num_claims = len(notices), len(claims)
        for priority in (Priority.LOW, Priority.NORMAL):
            await bench.submit(submission(f"waiting-{priority}", priority=priority))
        await until(lambda: len(notices) == num_notices + 2)
        assert await bench.num_queued() == 2
        assert len(claims) == num_claims
        await bench.submit(submission("urgent", priority=Priority.HIGH))
        urgent = await bench.take()
        assert urgent.request_id == "urgent"
        for request in (urgent, *running):
            draw(request)
        assert (await bench.take()).request_id == f"waiting-{Priority.NORMAL}"
