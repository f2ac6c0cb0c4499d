"""Health tells the truth about the job store, and no job is taken into a file that is not there any more."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from hidream.v1 import job_pb2
from tests.failure.faulty_servers import ONE_THREAD, FaultyServer, server_on_postgres
from tests.support.job_calls import WAIT_SECONDS, downloaded, get, is_accepted, submit, wait_for_state
from tests.support.live_server import LiveServer, check_health, running_server, wait_until, watched_health
from tests.support.postgres import PostgresServer

OUTAGE_SECONDS = 1.0
Status = health_pb2.HealthCheckResponse.ServingStatus


# --- PostgreSQL ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_postgres(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    with (
        postgres.database() as url,
        server_on_postgres(
            postgres,
            url,
            tmp_path_factory.mktemp("images"),
            "one",
            "--store-outage-seconds",
            str(OUTAGE_SECONDS),
            password="secret",
        ) as server,
    ):
        yield server


def silence(server: FaultyServer, postgres: PostgresServer, database: str) -> Callable[[], None]:
    server.store.silence()
    return server.store.heal


def cut(server: FaultyServer, postgres: PostgresServer, database: str) -> Callable[[], None]:
    server.store.cut()
    return server.store.heal


def revoke(server: FaultyServer, postgres: PostgresServer, database: str) -> Callable[[], None]:
    postgres.execute(f"REVOKE INSERT ON jobs FROM {server.role};", database)
    return lambda: postgres.execute(f"GRANT INSERT ON jobs TO {server.role};", database)


@pytest.mark.parametrize("fault", [cut, silence, revoke])
def test_health_is_not_serving_while_the_store_refuses_everything_and_serving_once_it_heals(
    fault: Callable[[FaultyServer, PostgresServer, str], Callable[[], None]],
    on_postgres: FaultyServer,
    postgres: PostgresServer,
) -> None:
    live = on_postgres.live
    database = f"/{on_postgres.role.rpartition('_')[0]}"
    num_lines = len(live.log_lines)
    with watched_health(live) as next_status:
        assert next_status() == Status.SERVING
        heal = fault(on_postgres, postgres, database)
        try:
            assert next_status() == Status.NOT_SERVING
            assert check_health(live.address, "") == Status.NOT_SERVING
            assert check_health(live.address, "liveness") == Status.SERVING
        finally:
            heal()
        assert next_status() == Status.SERVING
    line = f"the job store has refused what a job needs for {OUTAGE_SECONDS:g} s: health says NOT_SERVING"
    assert len(live.logged_lines(line, after=num_lines)) == 1
    with live.stub() as stub:
        assert is_accepted(stub)


# --- the file -----------------------------------------------------------------------------------------


@contextmanager
def moved(path: Path) -> Iterator[None]:
    away = path.with_name(path.name + ".away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Another file in its place, with the same content."""
    with moved(path):
        shutil.copy(path.with_name(path.name + ".away"), path)
        yield
        path.unlink()


@pytest.fixture(scope="module")
def on_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Path]]:
    folder = tmp_path_factory.mktemp("parent") / "data"
    flags = (
        "--data-dir",
        str(folder),
        "--store-outage-seconds",
        str(OUTAGE_SECONDS),
        "--max-running-jobs",
        "1",
        "--grace-seconds",
        "1",
    )
    with running_server(*flags, *ONE_THREAD) as server:
        yield server, folder


WAYS = {
    "the file is moved": (moved, "jobs.sqlite"),
    "the file is replaced": (replaced, "jobs.sqlite"),
    "its log is replaced": (replaced, "jobs.sqlite-wal"),
    "its shared memory is moved": (moved, "jobs.sqlite-shm"),
    "its lock is moved": (moved, "jobs.sqlite.lock"),
    "its folder is moved": (moved, ""),
}


LESS_OFTEN = ("its log is replaced", "its shared memory is moved")
"""The same kinds as with the file itself."""


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.long if way in LESS_OFTEN else ()) for way in WAYS]
)
def test_while_the_file_of_the_jobs_is_taken_away_nothing_is_accepted_that_would_be_lost(
    way: str, on_file: tuple[LiveServer, Path]
) -> None:
    server, folder = on_file
    take_away, name = WAYS[way]
    line = f"{folder / (name or 'jobs.sqlite')} was removed or replaced while it is in use: put it back, or"
    reason = f"cannot use the job store: the job store does not answer ({line}"
    num_lines = len(server.log_lines)
    with server.stub() as stub, watched_health(server) as next_status:
        assert next_status() == Status.SERVING
        # Until it has ended there is something to write into the folder.
        num_steps = 40 if take_away is moved and not name else 1
        runs = submit(stub, num_inference_steps=num_steps).job_id
        with take_away(folder / name if name else folder):
            assert not is_accepted(stub)
            assert next_status() == Status.NOT_SERVING
            assert len(server.logged_lines(reason, after=num_lines)) == 1
        assert next_status() == Status.SERVING
        # Put back, it goes on as if nothing had happened: at once, or after the next probe of the images.
        if not name:
            wait_until(lambda: is_accepted(stub), WAIT_SECONDS, "images can be stored again")
        for job_id in (runs, submit(stub, num_inference_steps=1).job_id):
            wait_for_state(stub, job_id, job_pb2.JOB_STATE_SUCCEEDED)
        assert get(stub, runs).execution.attempt == 1
        assert downloaded(stub, runs)
