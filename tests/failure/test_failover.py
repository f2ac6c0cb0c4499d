"""The primary of PostgreSQL becomes read-only under open connections, and another server takes its place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hidream.v1 import job_pb2
from hidream_grpc.errors import StoreUnavailableError
from hidream_grpc.jobs.job import Job
from hidream_grpc.jobs.store.changes import ChangeKind, Subscription
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.failure.faulty_servers import ONE_THREAD
from tests.failure.tcp_proxy import running_proxy
from tests.support.job_calls import get, is_accepted, submit, wait_for_state
from tests.support.job_stores import StoreDatabase, added, eventually, ids, new_job
from tests.support.live_server import running_server, wait_until
from tests.support.postgres import PostgresServer, running_postgres

HEAL_SECONDS = 10.0


class Cluster:
    """A primary, its standby, and the URL that stores of a test use."""

    def __init__(self, primary: PostgresServer, standby: PostgresServer, way: str, stack: ExitStack) -> None:
        self._primary, self._standby = primary, standby
        primary.execute("CREATE DATABASE jobs;")
        if way == "several hosts":
            hosts = ",".join(str(server.socket_path.parent) for server in (primary, standby))
            self._proxy = None
            self.url = f"postgresql://postgres@/jobs?host={hosts}"
        else:
            self._proxy = stack.enter_context(running_proxy(primary.socket_path))
            self.url = f"postgresql://postgres@127.0.0.1:{self._proxy.port}/jobs"

    def fail_over(self) -> None:
        """The primary gives up, and keeps its connections; new ones reach the other one."""
        self._primary.fail_over_to(self._standby)
        if self._proxy is not None:
            self._proxy.redirect(self._standby.socket_path)


@contextmanager
def cluster(way: str) -> Iterator[Cluster]:
    with running_postgres() as primary, primary.standby() as standby, ExitStack() as stack:
        yield Cluster(primary, standby, way, stack)


@pytest.mark.parametrize(
    "way", ["several hosts", pytest.param("one name that moves", marks=pytest.mark.long)]
)
async def test_replicas_write_to_the_new_primary_and_hear_of_each_other_there(way: str) -> None:
    with cluster(way) as databases:
        database = StoreDatabase(databases.url, is_file=False)
        async with database.opened() as store, database.opened() as other:
            # Each has connections that are open and unused.
            kept = await added(store, new_job())
            assert await other.get_all(ids(kept)) == kept
            with other.subscribe() as changes:
                databases.fail_over()
                later = await eventually(lambda: accepted(store), HEAL_SECONDS)
                await eventually(lambda: accepted(other), HEAL_SECONDS)
                # Its session at the old primary has ended, and what it may have missed there is made up for.
                await heard(changes, ChangeKind.ANYTHING)
                (told,) = await added(store, new_job())
                await heard(changes, ChangeKind.ADDED, told.job_id)
            assert {*ids(await other.get_all(ids(kept + later)))} == {*ids(kept + later)}


async def heard(changes: Subscription, kind: ChangeKind, job_id: str = "") -> None:
    async with asyncio.timeout(HEAL_SECONDS):
        async for change in changes:
            if (change.kind, change.job_id) == (kind, job_id):
                return


async def accepted(store: SqlJobStore) -> tuple[Job, ...] | None:
    try:
        return await added(store, new_job())
    except StoreUnavailableError:
        return None


def test_a_server_goes_on_at_the_new_primary_without_a_restart(tmp_path: Path) -> None:
    with cluster("one name that moves") as databases:
        flags = ("--store", databases.url, "--data-dir", str(tmp_path), *ONE_THREAD)
        with running_server(*flags) as server, server.stub() as stub:
            kept = submit(stub).job_id
            wait_for_state(stub, kept, job_pb2.JOB_STATE_SUCCEEDED)
            databases.fail_over()
            wait_until(lambda: is_accepted(stub), HEAL_SECONDS, "jobs are accepted again")
            later = submit(stub).job_id
            wait_for_state(stub, later, job_pb2.JOB_STATE_SUCCEEDED)
            assert get(stub, kept).state == job_pb2.JOB_STATE_SUCCEEDED
