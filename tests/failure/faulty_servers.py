"""Servers of one store that can each be paused, cut off from it, and given another time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.failure.clocks import SteppedClock
from tests.failure.tcp_proxy import TcpProxy, running_proxy
from tests.support.live_server import LiveServer, running_server
from tests.support.postgres import PostgresServer

ONE_THREAD = ("--devices", "0", "--threads-per-rank", "1")
LEASE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class FaultyServer:
    """One server, the way to its database, and its clock.

    Attributes:
        stepped_clock: of a server that was started with one.
        proxy: in front of PostgreSQL; None on SQLite.
        role: which PostgreSQL knows its connections by.
    """

    name: str
    live: LiveServer
    stepped_clock: SteppedClock | None = None
    proxy: TcpProxy | None = None
    role: str = ""

    @property
    def clock(self) -> SteppedClock:
        assert self.stepped_clock is not None, "the server was started without has_clock"
        return self.stepped_clock

    @property
    def store(self) -> TcpProxy:
        assert self.proxy is not None, "SQLite has no connection to cut"
        return self.proxy

    def pause(self) -> None:
        """Stop the server process, and not its ranks."""
        os.kill(self.live.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        os.kill(self.live.pid, signal.SIGCONT)

    @contextmanager
    def paused(self, seconds: float = 0.0, *, with_ranks: bool = False) -> Iterator[None]:
        """Stop the server for the block, and for so long at least; it goes on afterwards."""
        pids = [self.live.pid, *(self.live.rank_pids() if with_ranks else ())]
        wake_time = time.monotonic() + seconds
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
            # The length of a pause is the fault itself.
            time.sleep(max(0.0, wake_time - time.monotonic()))
        finally:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def server_on_postgres(
    postgres: PostgresServer,
    url: str,
    folder: Path,
    name: str,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    password: str = "",
    has_clock: bool = False,
) -> Iterator[FaultyServer]:
    """A server whose connections to a database go through a proxy, and belong to a role of its own.

    Args:
        url: of a database (`PostgresServer.database`).
        folder: where all servers of a test keep their images, unless flags say otherwise.
        name: of this server, and of its role.
        password: of the role, which then owns the database and is no superuser.
        has_clock: whether the test steps its clock; such a server takes seconds of a core longer to start.
    """
    database = url.partition("?")[0].rpartition("/")[2]
    role = f"{database}_{name}"
    if password:
        postgres.execute(
            f"CREATE ROLE {role} LOGIN PASSWORD '{password}'; ALTER DATABASE {database} OWNER TO {role};"
        )
    else:
        # Each replica reads and changes the tables that another has made.
        postgres.execute(f"CREATE ROLE {role} LOGIN SUPERUSER;")
    with ExitStack() as stack:
        proxy = stack.enter_context(running_proxy(postgres.socket_path))
        user = f"{role}:{password}" if password else role
        store = f"postgresql+asyncpg://{user}@127.0.0.1:{proxy.port}/{database}"
        artifacts = () if "--artifacts" in flags else ("--artifacts", (folder / "artifacts").as_uri())
        lease = () if "--lease-seconds" in flags else ("--lease-seconds", str(LEASE_SECONDS))
        clock = stack.enter_context(_stepped_clock(folder / f"clock-{name}")) if has_clock else None
        variables = {**(clock.environment if clock else {}), **(environment or {})}
        words = ("--store", store, *artifacts, *lease, *ONE_THREAD, *flags)
        live = stack.enter_context(running_server(*words, environment=variables))
        # A server that a test left paused could not end.
        stack.callback(_wake, live)
        stack.callback(proxy.heal)
        yield FaultyServer(name, live, clock, proxy, role)


@contextmanager
def servers_on_postgres(
    postgres: PostgresServer, folder: Path, names: Sequence[str], *flags: str, has_clock: bool = False
) -> Iterator[list[FaultyServer]]:
    """Replicas of one database of their own."""
    with ExitStack() as stack:
        url = stack.enter_context(postgres.database())
        yield [
            stack.enter_context(server_on_postgres(postgres, url, folder, name, *flags, has_clock=has_clock))
            for name in names
        ]


@contextmanager
def server_on_sqlite(
    folder: Path, *flags: str, environment: Mapping[str, str] | None = None, has_clock: bool = False
) -> Iterator[FaultyServer]:
    """A server with its jobs in a file."""
    words = ("--data-dir", str(folder / "data"), *ONE_THREAD, *flags)
    with ExitStack() as stack:
        clock = stack.enter_context(_stepped_clock(folder / "clock")) if has_clock else None
        variables = {**(clock.environment if clock else {}), **(environment or {})}
        live = stack.enter_context(running_server(*words, environment=variables))
        stack.callback(_wake, live)
        yield FaultyServer("only", live, clock)


@contextmanager
def _stepped_clock(path: Path) -> Iterator[SteppedClock]:
    clock = SteppedClock(path)
    try:
        yield clock
    finally:
        clock.close()


def _wake(live: LiveServer) -> None:
    if live.process.poll() is None:
        os.kill(live.pid, signal.SIGCONT)
