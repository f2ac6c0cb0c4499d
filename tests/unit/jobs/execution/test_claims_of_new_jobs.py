"""When a server that is told of a new job looks at the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from hidream_grpc.engine.requests import Priority
from hidream_grpc.jobs.execution.executor import JobExecutor
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.unit.jobs.service_bench import LIMITS, bench_in, draw, submission, until


def noted(owner: type, method: str) -> Any:
    """The method as it is, for a block in which its calls are counted."""
    return patch.object(owner, method, autospec=True, side_effect=getattr(owner, method))


async def test_a_full_server_looks_at_the_queue_for_none_but_more_urgent_jobs(tmp_path: Path) -> None:
    with noted(JobExecutor, "notify") as notices, noted(SqlJobStore, "claim") as claims:
        async with bench_in(tmp_path) as bench:
            running = []
            for number in range(LIMITS.max_running_jobs):
                await bench.submit(submission(f"running-{number}"))
                running.append(await bench.take())
            # The claim after the last one finds nothing.
            await until(lambda: claims.call_count > LIMITS.max_running_jobs)
            await bench.num_queued()
            num_notices, num_claims = notices.call_count, claims.call_count
            for priority in (Priority.LOW, Priority.NORMAL):
                await bench.submit(submission(f"waiting-{priority}", priority=priority))
            await until(lambda: notices.call_count == num_notices + 2)
            assert await bench.num_queued() == 2
            assert claims.call_count == num_claims
            await bench.submit(submission("urgent", priority=Priority.HIGH))
            urgent = await bench.take()
            assert urgent.request_id == "urgent"
            for request in (urgent, *running):
                draw(request)
            assert (await bench.take()).request_id == f"waiting-{Priority.NORMAL}"
