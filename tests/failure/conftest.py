from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresServer, running_postgres


@pytest.fixture(scope="module")
def guarded() -> Iterator[PostgresServer]:
    """A PostgreSQL that asks for passwords, but the superuser's."""
    with running_postgres() as server:
        rules = server.data_folder / "pg_hba.conf"
        rules.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        server.execute("SELECT pg_reload_conf();")
        yield server
