from __future__ import annotations

from pathlib import Path

import pytest

from hidream_grpc.jobs.store.url import PostgresDatabase, SqliteFile, parse_store_url

HOSTS = {
    "postgresql://h/db": "h:5432",
    "postgresql://h:6543/db": "h:6543",
    "postgresql://a:1,b,[::1]:3/db": "a:1 b:5432 [::1]:3",
    "postgresql://u:p@localhost/db?host=/cloudsql/p:r:i": "/cloudsql/p:r:i:5432",
    "postgresql://h:6543/db?host=/run/postgresql": "/run/postgresql:6543",
    "postgresql://h:5432/db?port=6543": "h:6543",
    "postgresql://h/db?host=a,b&port=1,2": "a:1 b:2",
    "postgresql:///db?host=a:1,b:2": "a:1 b:2",
    "postgresql:///db?host=a,b&port=7": "a:7 b:7",
    "postgresql:///db?port=7": "localhost:7",
    "postgresql:///db": "",
}


@pytest.mark.parametrize("url", HOSTS)
def test_the_hosts_are_those_that_libpq_would_take(url: str) -> None:
    database = parse_store_url(url)
    assert isinstance(database, PostgresDatabase)
    assert " ".join(map(str, database.hosts)) == HOSTS[url]


def test_a_parameter_goes_before_what_the_url_says_elsewhere() -> None:
    database = parse_store_url("postgresql://u:p@h/db?user=U&password=P%2F&dbname=D")
    assert isinstance(database, PostgresDatabase)
    given = database.arguments
    assert (given["user"], given["password"], given["database"]) == ("U", "P/", "D")


def test_the_name_of_a_file_may_hold_what_is_percent_encoded() -> None:
    assert parse_store_url("sqlite:////data/a%3Fb/./%7E") == SqliteFile(Path("/data/a?b/~"))
