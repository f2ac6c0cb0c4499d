"""A real PgBouncer in front of a database: what `scripts/install_pgbouncer.sh` has unpacked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from tests.support.live_server import wait_until
from tests.support.postgres import PostgresServer
from tests.support.unused_ports import unused_port

FOLDER = Path(__file__).parents[2] / ".cache" / "pgbouncer"
START_SECONDS = 20.0
SETTINGS = """
[databases]
* = host={host}
[pgbouncer]
listen_addr = 127.0.0.1,::1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
pool_mode = {pool_mode}
default_pool_size = {pool_size}
client_tls_sslmode = allow
client_tls_key_file = {folder}/key.pem
client_tls_cert_file = {folder}/certificate.pem
"""


class Pooler:
    """A running PgBouncer.

    Attributes:
        port: on 127.0.0.1, ::1 and localhost, where it speaks TLS too.
        authority: the file with the certificate that its own is signed with.
    """

    def __init__(self, port: int, authority: Path) -> None:
        self.port = port
        self.authority = authority


@contextmanager
def running_pooler(
    postgres: PostgresServer, pool_mode: str, passwords: dict[str, str], pool_size: int = 30
) -> Iterator[Pooler]:
    """A pooler for all databases of a server, and for these users of it."""
    program = FOLDER / "usr" / "sbin" / "pgbouncer"
    if not program.exists():
        pytest.skip("there is no PgBouncer: scripts/install_pgbouncer.sh")
    folder = Path(tempfile.mkdtemp(prefix="hidream-pgbouncer-"))
    try:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        authority.cert_pem.write_to_path(folder / "authority.pem")
        users = "".join(f'"{user}" "{password}"\n' for user, password in passwords.items())
        (folder / "users").write_text(users, encoding="utf-8")
        port = unused_port()
        settings = SETTINGS.format(
            host=postgres.socket_path.parent,
            port=port,
            folder=folder,
            pool_mode=pool_mode,
            pool_size=pool_size,
        )
        (folder / "settings").write_text(settings, encoding="utf-8")
        # It will not run as root.
        user = postgres.system_user
        if user is not None:
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, user)
        process = subprocess.Popen(
            [program, folder / "settings"],
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, (FOLDER / "usr/lib").glob("*")))},
            user=user,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: _listens(port), START_SECONDS, "the pooler listens")
            yield Pooler(port, folder / "authority.pem")
        finally:
            process.terminate()
            process.wait(START_SECONDS)
    finally:
        shutil.rmtree(folder)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True
