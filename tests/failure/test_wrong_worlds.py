"""Surroundings in which no server can start: each is told in one line with its own reason."""

from __future__ import annotations

import os
import pwd
import re
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.answering_servers import answering
from tests.support.postgres import PostgresServer
from tests.support.refused_starts import refused_line, refused_line_here
from tests.support.small_disks import small_disk

LISTEN = ("--listen", "127.0.0.1:0")


# --- the folder and the file --------------------------------------------------------------------------


def text(folder: Path) -> None:
    (folder / "jobs.sqlite").write_text("no database, but longer than the head of one\n" * 100)


def truncated(folder: Path) -> None:
    """A database of which only the first half is there."""
    path = folder / "jobs.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE jobs (content)")
        connection.executemany("INSERT INTO jobs VALUES (?)", [("x" * 1000,) for _ in range(100)])
    connection.close()
    os.truncate(path, path.stat().st_size // 2)


def another_hands(folder: Path) -> None:
    with sqlite3.connect(folder / "jobs.sqlite") as connection:
        connection.execute("CREATE TABLE jobs (id)")
    connection.close()


def of_versions(*versions: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        with sqlite3.connect(folder / "jobs.sqlite") as connection:
            connection.execute("CREATE TABLE alembic_version (version_num)")
            connection.executemany(
                "INSERT INTO alembic_version VALUES (?)", [(version,) for version in versions]
            )
        connection.close()

    return prepare


DAMAGED_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another kind of file": (text, "jobs.sqlite: file is not a database"),
    "a truncated file": (truncated, "jobs.sqlite: database disk image is malformed"),
    "a folder in its place": (
        lambda folder: (folder / "jobs.sqlite").mkdir(),
        "jobs.sqlite: Is a directory",
    ),
    "a folder in the place of the lock": (
        lambda folder: (folder / "jobs.sqlite.lock").mkdir(),
        "jobs.sqlite.lock: Is a directory",
    ),
    "a link to nowhere": (
        lambda folder: (folder / "jobs.sqlite").symlink_to(folder / "away" / "jobs.sqlite"),
        "jobs.sqlite: No such file or directory",
    ),
    "a link to itself": (
        lambda folder: (folder / "jobs.sqlite").symlink_to(folder / "jobs.sqlite"),
        "jobs.sqlite: Too many levels of symbolic links",
    ),
    "a table of another hand": (another_hands, "jobs.sqlite: table jobs already exists"),
    "a newer version": (
        of_versions("9999"),
        "jobs.sqlite was written by a newer version of this service",
    ),
    "a version of another program": (
        of_versions("ae1027a6acf"),
        "jobs.sqlite: its table alembic_version is another program's: 'ae1027a6acf'",
    ),
    "two versions": (
        of_versions("0001", "0002"),
        "jobs.sqlite: its table alembic_version holds 2 versions",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED_FILES)
def test_a_file_that_cannot_hold_jobs_is_one_line(kind: str, tmp_path: Path) -> None:
    prepare, reason = DAMAGED_FILES[kind]
    prepare(tmp_path)
    assert refused_line_here([*LISTEN, "--data-dir", tmp_path]) == (
        f"hidream-grpc: --data-dir: {tmp_path}/{reason}"
    )
    store = f"sqlite:///{tmp_path}/jobs.sqlite"
    assert refused_line_here([*LISTEN, "--data-dir", tmp_path / "data", "--store", store]) == (
        f"hidream-grpc: --store: {tmp_path}/{reason}"
    )


def test_a_path_that_is_too_long_for_sqlite_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "/".join(["x" * 200] * 3)
    assert refused_line_here([*LISTEN, "--data-dir", folder]) == (
        f"hidream-grpc: --data-dir: {folder}/jobs.sqlite: longer than the 504 bytes of SQLite"
    )


UNWRITABLE: dict[str, tuple[str, int, str]] = {
    "a folder": ("", 0o500, "cannot write to {folder}: Permission denied"),
    "a file": ("jobs.sqlite", 0o400, "{folder}/jobs.sqlite: Permission denied"),
    "a lock": ("jobs.sqlite.lock", 0o000, "{folder}/jobs.sqlite.lock: Permission denied"),
    "a log": ("jobs.sqlite-wal", 0o400, "{folder}/jobs.sqlite-wal: Permission denied"),
}
"""What is another user's, its mode, and the reason."""


@pytest.mark.parametrize(
    "kind", ["a file", *(pytest.param(k, marks=pytest.mark.long) for k in ("a folder", "a lock", "a log"))]
)
def test_what_is_another_users_is_one_line(kind: str, tmp_path: Path) -> None:
    name, mode, reason = UNWRITABLE[kind]
    for each in ("jobs.sqlite", name):
        if each:
            (tmp_path / each).touch()
    (tmp_path / name).chmod(mode)
    line = refused_line([*LISTEN, "--data-dir", tmp_path], with_rights_of_modes=True)
    assert line == f"hidream-grpc: --data-dir: {reason.format(folder=tmp_path)}"


def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert refused_line_here([*LISTEN, "--data-dir", disk]) == (
            f"hidream-grpc: --data-dir: cannot write to {disk}: Read-only file system"
        )
        assert refused_line_here(
            [*LISTEN, "--data-dir", tmp_path, "--artifacts", (disk / "images").as_uri()]
        ) == (f"hidream-grpc: --artifacts: cannot write to {disk}/images: Read-only file system")


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, "NoSuchBucket", "the bucket or the folder is not there"),
        (403, "AccessDenied", "403 Forbidden: <Error><Code>AccessDenied</Code></Error>"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(
    status: int, code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(status, f"<Error><Code>{code}</Code></Error>") as url:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }.items():
            monkeypatch.setenv(name, value)
        line = refused_line_here([*LISTEN, "--data-dir", tmp_path, "--artifacts", "s3://bucket/of/images"])
    assert line.startswith("hidream-grpc: --artifacts: s3://bucket/of/images: ")
    assert line.endswith(reason)
    assert "secret" not in line


@pytest.mark.parametrize("home", [None, ""], ids=["no variable", "an empty variable"])
def test_a_home_that_is_not_set_is_one_line(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_user(_: int) -> None:
        raise KeyError

    # As in a container whose user has no name.
    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    assert refused_line_here(LISTEN) == (
        "hidream-grpc: --data-dir: must name a folder, since neither XDG_DATA_HOME nor HOME is set"
    )


@pytest.mark.parametrize("variable", ["XDG_DATA_HOME", "HOME"])
@pytest.mark.parametrize("folder", ["data", " "], ids=["relative", "blank"])
def test_a_home_that_is_no_absolute_path_is_one_line(
    variable: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv(variable, folder)
    assert refused_line_here(LISTEN) == (
        f"hidream-grpc: {variable}: {folder!r} is no absolute path; name one, or give --data-dir"
    )


def test_a_home_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert refused_line_here(LISTEN) == (
        "hidream-grpc: --data-dir: cannot write to /proc/nowhere/.local/share/hidream-grpc: "
        "No such file or directory"
    )


# --- the URL ------------------------------------------------------------------------------------------

FORMS = "must be postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////FOLDER/jobs.sqlite"
ENCODED = "a special character in the user or password must be percent-encoded, such as %2F for /"
BAD_URLS = {
    "another database": ("mysql://u:secret@h/db", FORMS),
    "another driver": ("postgresql+psycopg://u:secret@h/db", FORMS),
    "words of libpq": ("host=h password=secret", FORMS),
    "jobs in memory": ("sqlite://", f"{FORMS}: jobs are kept in a file"),
    "a parameter of a file": ("sqlite:////f/jobs.sqlite?mode=ro", "?mode: a SQLite file has no parameters"),
    "a question mark in a file's name": (
        "sqlite:////f/a?b/jobs.sqlite",
        "?b/jobs.sqlite: a SQLite file has no parameters; a ? of its name is written %3F",
    ),
    "a home of no shell": (
        "sqlite:///~/jobs.sqlite",
        "'~/jobs.sqlite': only a shell expands ~; write the whole path, or ./~ for such a name",
    ),
    "a file at a host": ("sqlite://u:secret@h:no/x", f"{FORMS}: jobs are kept in a file"),
    "a zero byte in a file's name": ("sqlite:////f/%00x", f"holds a zero byte: {FORMS}"),
    "a zero byte in a database's name": ("postgres://u:secret@h/%00x", f"holds a zero byte: {FORMS}"),
    "a file that is not UTF-8": (
        "postgres://h/db?sslmode=verify-ca&sslrootcert=" + os.fsdecode(b"\xff"),
        f"cannot be read: {FORMS}",
    ),
    "a password that is not UTF-8": ("postgres://u:secret%ff@h/db", f"cannot be read: {FORMS}"),
    "an empty parameter": (
        "postgres://u:secret@h/db?sslmode=",
        "parameter 'sslmode' is empty; leave it out to have its default",
    ),
    "a parameter twice": ("postgres:///db?host=a&host=b", "parameter 'host' is there twice"),
    "two names of one parameter": (
        "postgres://h/db?sslmode=require&ssl=disable",
        "parameter 'sslmode' is there twice",
    ),
    "another name of a mode of TLS": (
        "postgres://h/db?ssl=true",
        "ssl=true: must be one of disable, allow, prefer, require, verify-ca, verify-full",
    ),
    "an empty host": ("postgres://u:secret@,h/db", "one of the hosts is empty"),
    "a slash in the password": ("postgresql://u:sec/ret@h/db", ENCODED),
    "a hash in the password": ("postgresql://u:sec#ret@h/db", ENCODED),
    "a question mark in the password": ("postgresql://u:1?secret=1@h/db", ENCODED),
    "no port": (
        "postgresql://u:p@h:secret/db",
        "a port must be a number from 1 to 65535, and special characters percent-encoded",
    ),
    "a broken address": ("postgresql://u:secret@[::1/db", f"cannot be read: {FORMS}"),
    "ports for other hosts": (
        "postgresql:///db?host=a,b,c&port=1,2",
        "port: there are 2 of them for 3 hosts",
    ),
    "a parameter of a client": (
        "postgres://u:secret@h/db?pgbouncer=true",
        "parameter 'pgbouncer' is not supported",
    ),
    "binding to a channel": (
        "postgres://u:secret@h/db?sslmode=require&channel_binding=require",
        "channel_binding=require is not supported; leave it out, and let sslmode=verify-full with "
        "sslrootcert=system prove that the server is the right one",
    ),
    "no mode of TLS": (
        "postgres://u:secret@h/db?sslmode=on",
        "sslmode=on: must be one of disable, allow, prefer, require, verify-ca, verify-full",
    ),
    "no certificate": (
        "postgres://u:secret@h/db?sslmode=verify-ca&sslrootcert=/no/such.crt",
        "sslrootcert=/no/such.crt: no such file",
    ),
    "a certificate whose name no file can have": (
        f"postgres://h/db?sslmode=verify-ca&sslrootcert={'x' * 256}",
        f"sslrootcert={'x' * 256}: File name too long",
    ),
    "a port of many digits": (
        f"postgresql://h:{'9' * 5000}/db",
        "a port must be a number from 1 to 65535, and special characters percent-encoded",
    ),
    "a time of many digits": (f"postgres://h/db?connect_timeout={'9' * 400}", "connect_timeout=999"),
    "a weak mode": (
        "postgres://u:secret@h/db?sslmode=require&sslrootcert=system",
        "sslmode=require with sslrootcert=system: must be verify-full",
    ),
    "a standby": (
        "postgres://u:secret@h/db?target_session_attrs=read-only",
        "target_session_attrs=read-only: jobs are written, so it must be read-write or primary",
    ),
    "no time": ("postgres://h/db?connect_timeout=soon", "connect_timeout=soon: must be a number of seconds"),
    "nobody listens": (
        "postgres://u:secret@127.0.0.1:1/db",
        "cannot connect to 127.0.0.1:1: Connection refused",
    ),
    "nobody listens at any of them": (
        "postgres://u:secret@127.0.0.1:1,[::1]:2/db",
        "cannot connect to 127.0.0.1:1: Connection refused; cannot connect to [::1]:2: Connection refused",
    ),
    "no socket": (
        "postgres://u:secret@/db?host=/no/folder",
        "cannot connect to /no/folder:5432: No such file or directory",
    ),
    "no host name": (
        f"postgres://u:secret@{'x' * 64}.example/db",
        f"cannot connect to {'x' * 64}.example:5432: ",
    ),
}


@pytest.mark.parametrize("kind", BAD_URLS)
def test_a_url_that_cannot_be_used_is_one_line_without_the_password(kind: str, tmp_path: Path) -> None:
    url, reason = BAD_URLS[kind]
    line = refused_line_here([*LISTEN, "--data-dir", tmp_path, "--store", url])
    assert line.startswith(f"hidream-grpc: --store: {reason}")
    assert "sec" not in line.replace("seconds", "")


# --- the database -------------------------------------------------------------------------------------


REFUSALS = {
    "a wrong password": (
        "{role}:wrong@/{database}",
        "",
        'password authentication failed for user "{role}"',
    ),
    "a role that is not there": (
        "nobody:secret@/{database}",
        "",
        'password authentication failed for user "nobody"',
    ),
    "a database that is not there": ("{role}:secret@/nowhere", "", 'database "nowhere" does not exist'),
    "no right to make tables": (
        "{role}:secret@/{database}",
        "REVOKE ALL ON SCHEMA public FROM PUBLIC; ALTER SCHEMA public OWNER TO postgres;",
        # As an unqualified table finds no schema that may be written.
        "no schema has been selected to create in",
    ),
    "no right to connect": (
        "{role}:secret@/{database}",
        "REVOKE CONNECT ON DATABASE {database} FROM PUBLIC;",
        'permission denied for database "{database}"',
    ),
    "a table of another hand": (
        "postgres@/{database}",
        "CREATE TABLE jobs (id int);",
        'relation "jobs" already exists',
    ),
    "a newer version": (
        "postgres@/{database}",
        "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('9999');",
        "the job store was written by a newer version of this service",
    ),
    "a database that is read-only": (
        "postgres@/{database}",
        "ALTER DATABASE {database} SET default_transaction_read_only = on;",
        "cannot connect to {folder}:5432: the database is read-only",
    ),
    "a parameter that the database does not know": (
        "postgres@/{database}",
        "",
        'unrecognized configuration parameter "no_such"',
    ),
}
"""Credentials and database of the URL, what is done to the database before, and the reason."""


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_database_that_refuses_us_is_one_line_with_its_reason(
    kind: str, guarded: PostgresServer, tmp_path: Path
) -> None:
    place, before, reason = REFUSALS[kind]
    with guarded.database() as url:
        database = url.partition("?")[0].rpartition("/")[2]
        names = {"role": f"{database}_starter", "database": database, "folder": guarded.socket_path.parent}
        guarded.execute(f"CREATE ROLE {names['role']} LOGIN PASSWORD 'secret';")
        if before:
            guarded.execute(before.format(**names), url)
        options = "&options=-c%20no_such%3D1" if "parameter" in kind else ""
        store = f"postgresql://{place.format(**names)}?host={names['folder']}{options}"
        line = refused_line_here([*LISTEN, "--data-dir", tmp_path, "--store", store])
    assert line == f"hidream-grpc: --store: {reason.format(**names)}"


# --- what nobody has thought of -----------------------------------------------------------------------


def test_an_unforeseen_error_is_one_line_with_an_id_that_the_log_file_has_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        raise LookupError("postgresql://u:secret@h/db")

    monkeypatch.setattr("hidream_grpc.cli.serve", fail)
    log_file = tmp_path / "log"
    line = refused_line_here(["--log-file", log_file], exit_code=1)
    told = re.fullmatch(
        r"hidream-grpc: internal error ([0-9a-f]{32}): LookupError in test_wrong_worlds\.py, line \d+; "
        r"the traceback is in --log-file, and here with --log-level DEBUG",
        line,
    )
    assert told is not None, line
    log = log_file.read_text(encoding="utf-8")
    assert f"error_id={told[1]}" in log
    assert "Traceback" in log
