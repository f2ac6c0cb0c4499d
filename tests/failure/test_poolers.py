"""The job store behind PgBouncer: in session mode as without it, in other modes refused at the start."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest

from hidream_grpc.errors import ConfigurationError, StoreUnusableError
from hidream_grpc.jobs.store.changes import ChangeKind
from hidream_grpc.jobs.store.postgresql import MAX_TRANSACTIONS
from hidream_grpc.jobs.store.store import SqlJobStore
from tests.support.job_stores import StoreDatabase, added, ids, new_job
from tests.support.pgbouncer import Pooler, running_pooler
from tests.support.postgres import PostgresServer
from tests.support.refused_starts import refused_line_here

PASSWORD = "p@ss/w:ö%rd?#"


@pytest.fixture(scope="module")
def role(postgres: PostgresServer) -> Iterator[str]:
    name = f"pooled_{uuid.uuid4().hex[:8]}"
    postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}';")
    yield name
    postgres.execute(f"DROP ROLE {name};")


@pytest.fixture(scope="module")
def session_pooler(postgres: PostgresServer, role: str) -> Iterator[Pooler]:
    with running_pooler(postgres, "session", {role: PASSWORD}) as pooler:
        yield pooler


@contextmanager
def database_of(postgres: PostgresServer, role: str) -> Iterator[str]:
    with postgres.database() as url:
        name = url.partition("?")[0].rpartition("/")[2]
        postgres.execute(f"ALTER DATABASE {name} OWNER TO {role};")
        yield name


@pytest.mark.parametrize("pool_mode", ["transaction", pytest.param("statement", marks=pytest.mark.long)])
def test_a_pooler_whose_sessions_are_not_ones_own_is_refused_in_one_line(
    pool_mode: str, postgres: PostgresServer, role: str, tmp_path: Path
) -> None:
    with (
        running_pooler(postgres, pool_mode, {role: PASSWORD}) as pooler,
        database_of(postgres, role) as database,
    ):
        url = f"postgresql://{role}:{quote(PASSWORD, safe='')}@127.0.0.1:{pooler.port}/{database}"
        line = refused_line_here(["--listen", "127.0.0.1:0", "--data-dir", tmp_path, "--store", url])
        # Other programs get the sessions that the start has used. Only transactions show which is which.
        if pool_mode == "transaction":
            count = (
                f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}' AND usename = '{role}';"
            )
            ((num_sessions,),) = postgres.query(count)
            assert set(asyncio.run(left_in_sessions(url, int(num_sessions))).values()) == {(0, None)}
    assert line == (
        "hidream-grpc: --store: notifications do not arrive, as behind a connection pooler in transaction "
        "mode: name its port for session mode, or the database itself"
    )


async def left_in_sessions(url: str, num_sessions: int) -> dict[int, tuple[int, str | None]]:
    """Read how many statements are prepared in each session of the pooler, and which limits are set."""
    left: dict[int, tuple[int, str | None]] = {}
    async with AsyncExitStack() as stack:
        for _ in range(num_sessions):
            connection = await asyncpg.connect(url, statement_cache_size=0)
            stack.callback(connection.terminate)
            # Keeps the session from the next one.
            await connection.execute("BEGIN")
            process, *rest = await connection.fetchrow(
                "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements), (SELECT"
                " string_agg(name, ',') FROM pg_settings WHERE source = 'session' AND name LIKE '%timeout')"
            )
            left[process] = tuple(rest)
    assert len(left) == num_sessions > 0
    return left


async def test_a_pooler_of_few_sessions_is_told_in_one_line(
    postgres: PostgresServer, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hidream_grpc.jobs.store.postgresql.STATEMENT_TIMEOUT_SECONDS", 2.0)
    with (
        running_pooler(postgres, "session", {role: PASSWORD}, pool_size=1) as pooler,
        database_of(postgres, role) as database,
    ):
        url = f"postgresql://{role}:{quote(PASSWORD, safe='')}@127.0.0.1:{pooler.port}/{database}"
        with pytest.raises(ConfigurationError) as refused:
            await SqlJobStore(url).open()
    assert str(refused.value) == (
        "--store: no answer within 2 s; a pooler must let each server have 6 sessions"
    )


async def test_a_server_needs_no_more_sessions_than_it_says(postgres: PostgresServer, role: str) -> None:
    with (
        running_pooler(postgres, "session", {role: PASSWORD}, pool_size=MAX_TRANSACTIONS + 1) as pooler,
        database_of(postgres, role) as name,
    ):
        url = f"postgresql://{role}:{quote(PASSWORD, safe='')}@127.0.0.1:{pooler.port}/{name}"
        async with StoreDatabase(url, is_file=False).opened() as store:
            with store.subscribe():
                jobs = await asyncio.gather(*(added(store, new_job()) for _ in range(12)))
            assert len(await store.get_all([job.job_id for (job,) in jobs])) == len(jobs)


URLS = {
    "postgres": "postgres://{login}@localhost:{port}/{database}",
    "postgresql": "postgresql://{login}@127.0.0.1:{port}/{database}",
    "asyncpg": "postgresql+asyncpg://{login}@localhost:{port}/{database}",
    "no TLS": "postgres://{login}@localhost:{port}/{database}?sslmode=disable",
    "TLS if there is": "postgres://{login}@localhost:{port}/{database}?sslmode=prefer&channel_binding=prefer",
    "TLS": "postgres://{login}@localhost:{port}/{database}?sslmode=require",
    "a known authority": "postgres://{login}@localhost:{port}/{database}?sslmode=verify-ca&sslrootcert={ca}",
    "a known host": "postgres://{login}@localhost:{port}/{database}?sslmode=verify-full&sslrootcert={ca}",
    "IPv6": "postgres://{login}@[::1]:{port}/{database}",
    "all in parameters": "postgres:///?host=127.0.0.1&port={port}&dbname={database}&user={user}"
    "&password={password}",
    "several hosts": "postgres://{login}@127.0.0.1:1,localhost:{port}/{database}"
    "?target_session_attrs=read-write",
    "a name and a time": "postgres://{login}@localhost:{port}/{database}"
    "?application_name=images&connect_timeout=7",
}


BY_DEFAULT = ("asyncpg", "TLS", "a known host", "all in parameters", "several hosts")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form in BY_DEFAULT else pytest.mark.long) for form in URLS]
)
async def test_every_form_of_url_works_and_behind_a_pooler_in_session_mode_too(
    form: str, postgres: PostgresServer, role: str, session_pooler: Pooler
) -> None:
    with database_of(postgres, role) as name:
        password = quote(PASSWORD, safe="")
        url = URLS[form].format(
            login=f"{role}:{password}",
            user=role,
            password=password,
            port=session_pooler.port,
            database=name,
            ca=session_pooler.authority,
        )
        database = StoreDatabase(url, is_file=False)
        async with database.opened() as store, database.opened() as other:
            with other.subscribe() as changes:
                (job,) = await added(store, new_job())
                async with asyncio.timeout(20.0):
                    change = await anext(changes)
            assert (change.kind, change.job_id) == (ChangeKind.ADDED, job.job_id)
            assert ids(await other.get_all([job.job_id])) == [job.job_id]


async def test_a_server_that_cannot_prove_its_name_is_refused_with_the_reason(
    postgres: PostgresServer, role: str, session_pooler: Pooler
) -> None:
    port, password = session_pooler.port, quote(PASSWORD, safe="")
    for host, parameters, reason in (
        (
            "127.0.0.1",
            f"sslmode=verify-full&sslrootcert={session_pooler.authority}",
            "certificate is not valid",
        ),
        ("localhost", "sslmode=verify-full&sslrootcert=system", "certificate verify failed"),
    ):
        url = f"postgres://{role}:{password}@{host}:{port}/any?{parameters}"
        with pytest.raises(StoreUnusableError, match=f"^cannot connect to {host}:{port}: .*{reason}"):
            async with StoreDatabase(url, is_file=False).opened():
                pass
