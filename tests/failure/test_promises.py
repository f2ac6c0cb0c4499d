"""While everything fails, every promise is kept: three replicas on PostgreSQL, and one server on SQLite.

A run lasts a minute, or as many as `--promise-minutes` says. What fails, and what callers do, comes from
`--promise-seed`; the failure says which, and the log has one line of counts for each run.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.failure.artifact_folder import ArtifactFolder
from tests.failure.bucket_proxy import running_bucket_proxy
from tests.failure.fault_schedule import bucket_faults, folder_faults, server_faults
from tests.failure.faulty_servers import server_on_sqlite, servers_on_postgres
from tests.failure.promise_run import PromiseRun, Setup
from tests.failure.promises import shown
from tests.support.postgres import PostgresServer
from tests.support.s3_server import BUCKET, running_s3_server

logger = logging.getLogger(__name__)

RUNNING = (
    *("--max-running-jobs", "4", "--max-retained-jobs", "1000000", "--grace-seconds", "2"),
    *("--orphan-sweep-seconds", "3"),
)
NAMES = ("first", "second", "third")


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    minutes: float | None = request.config.getoption("--promise-minutes")
    return 60.0 * (1.0 if minutes is None else minutes)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    chosen: str = request.config.getoption("--promise-seed")
    return chosen


@pytest.fixture
def kinds(request: pytest.FixtureRequest) -> list[str]:
    chosen: list[str] = request.config.getoption("--promise-fault")
    return chosen


def keep_promises(run: PromiseRun, record: Any) -> None:
    counts, found = run.run()
    logger.warning("promises: %s", counts.line())
    record("promises", counts.line())
    what = f"{len(found)} breaches under seed {counts.seed}: {counts.line()}"
    assert not found, f"{what}\n{shown(found)}"
    assert counts.jobs_by_state.get("SUCCEEDED", 0) > 0
    assert counts.faults


@pytest.mark.long
@pytest.mark.timeout(0)
def test_three_replicas_keep_every_promise_while_servers_store_clocks_and_images_fail(
    postgres: PostgresServer,
    tmp_path: Path,
    seconds: float,
    seed: str,
    kinds: list[str],
    record_property: Any,
) -> None:
    folder = ArtifactFolder(tmp_path / "artifacts")
    with servers_on_postgres(postgres, tmp_path, NAMES, *RUNNING, has_clock=True) as servers:
        faults = {server.name: server_faults(server) for server in servers}
        setup = Setup(servers, {**faults, "images": folder_faults(folder)}, folder.files)
        try:
            keep_promises(PromiseRun(setup, seed, seconds, kinds), record_property)
        finally:
            folder.heal()


@pytest.mark.long
@pytest.mark.timeout(0)
def test_one_server_on_a_file_keeps_every_promise_while_it_its_clock_and_its_bucket_fail(
    tmp_path: Path, seconds: float, seed: str, kinds: list[str], record_property: Any
) -> None:
    with ExitStack() as stack:
        s3 = stack.enter_context(running_s3_server())
        bucket = stack.enter_context(running_bucket_proxy(s3))
        flags = ("--artifacts", f"s3://{BUCKET}/promises", *RUNNING)
        server = stack.enter_context(
            server_on_sqlite(tmp_path, *flags, environment=bucket.environment, has_clock=True)
        )
        stack.callback(bucket.heal)
        faults = {server.name: server_faults(server), "images": bucket_faults(bucket)}
        setup = Setup([server], faults, s3.keys)
        keep_promises(PromiseRun(setup, seed, seconds, kinds), record_property)
