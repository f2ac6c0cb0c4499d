"""Reads the value of `--store`: a SQLite file, or a PostgreSQL database in the forms that providers write."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from hidream_grpc.errors import ConfigurationError

STORE_FLAG = "--store"
CONNECT_TIMEOUT_SECONDS = 5.0
MAX_CONNECT_TIMEOUT_SECONDS = 60.0
APPLICATION_NAME = "hidream-grpc"

_FORMS = "must be postgresql://USER:PASSWORD@HOST/DATABASE or sqlite:////FOLDER/jobs.sqlite"
_POSTGRESQL_SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg")
_SQLITE_SCHEMES = ("sqlite", "sqlite+aiosqlite")
_DEFAULT_PORT = 5432
_MAX_PORT = 65_535

_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_SSL_FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_ASYNCPG_PARAMETERS = (
    *_SSL_FILES,
    "sslmode",
    "sslpassword",
    "sslnegotiation",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "passfile",
    "krbsrvname",
    "gsslib",
)
_SERVER_SETTINGS = ("application_name", "options")
_WRITABLE = ("any", "read-write", "primary")
_BESIDE_SYSTEM_CERTIFICATES = {"sslrootcert", "sslmode", "passfile"}


@dataclass(frozen=True, slots=True)
class SqliteFile:
    """A SQLite file that holds the jobs."""

    path: Path


@dataclass(frozen=True, slots=True)
class PostgresHost:
    """One place where the database may be: a host name or address, or the folder of a Unix socket."""

    host: str
    port: int

    def __str__(self) -> str:
        is_ipv6 = ":" in self.host and not self.host.startswith("/")
        return f"[{self.host}]:{self.port}" if is_ipv6 else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PostgresDatabase:
    """A database, and how to connect to it.

    Attributes:
        hosts: the hosts to try, in this order; empty for those of libpq's environment variables and defaults.
        arguments: the arguments of `asyncpg.connect`, besides host and port.
    """

    hosts: tuple[PostgresHost, ...]
    arguments: Mapping[str, Any] = field(repr=False)


def parse_store_url(url: str) -> SqliteFile | PostgresDatabase:
    """Read the value of `--store`.

    Raises:
        ConfigurationError: says in one line which part is wrong, and never shows the password.
    """
    scheme, separator, _ = url.partition("://")
    if "\0" in unquote(url):
        raise _refusal(f"holds a zero byte: {_FORMS}")
    if separator and scheme in _SQLITE_SCHEMES:
        return _sqlite_file(url)
    if separator and scheme in _POSTGRESQL_SCHEMES:
        return _postgres_database(url)
    raise _refusal(_FORMS)


def _sqlite_file(text: str) -> SqliteFile:
    before, mark, query = text.partition("?")
    if mark:
        name = query.partition("=")[0]
        raise _refusal(f"?{name}: a SQLite file has no parameters; a ? of its name is written %3F")
    host, _, path = before.partition("://")[2].partition("/")
    path = unquote(path)
    if host or not path or path == ":memory:":
        raise _refusal(f"{_FORMS}: jobs are kept in a file")
    if path.startswith("~"):
        raise _refusal(f"{path!r}: only a shell expands ~; write the whole path, or ./~ for such a name")
    return SqliteFile(Path(path).absolute())


def _postgres_database(text: str) -> PostgresDatabase:
    try:
        parts = urlsplit(text)
        query = parse_qsl(
            parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict"
        )
        credentials, _, hosts_text = parts.netloc.rpartition("@")
        user, _, password = (unquote(word, errors="strict") for word in credentials.partition(":"))
        database = unquote(parts.path[1:], errors="strict")
        text.encode()
    except ValueError:
        # Its text may hold a piece of the password.
        raise _refusal(f"cannot be read: {_FORMS}") from None
    if parts.fragment or (not credentials and "@" in parts.path + parts.query):
        raise _refusal(
            "a special character in the user or password must be percent-encoded, such as %2F for /"
        )
    parameters = _parameters(query)
    # As with libpq a parameter goes before what the URL says elsewhere.
    hosts = _hosts(hosts_text, parameters.pop("host", ""), parameters.pop("port", ""))
    known: dict[str, str] = {
        "user": parameters.pop("user", user),
        "password": parameters.pop("password", password),
        "database": parameters.pop("dbname", database),
    }
    arguments: dict[str, Any] = {name: value for name, value in known.items() if value}
    return PostgresDatabase(hosts, {**arguments, **_connect_arguments(parameters)})


def _parameters(query: list[tuple[str, str]]) -> dict[str, str]:
    """The parameters by name; one that is empty or stands there twice is refused."""
    parameters: dict[str, str] = {}
    for given, value in query:
        # SQLAlchemy's names.
        name = {"ssl": "sslmode", "database": "dbname"}.get(given, given)
        if not value:
            raise _refusal(f"parameter {given!r} is empty; leave it out to have its default")
        if name in parameters:
            raise _refusal(f"parameter {name!r} is there twice")
        if name == "sslmode" and value not in _SSL_MODES:
            raise _refusal(f"{given}={value}: must be one of {', '.join(_SSL_MODES)}")
        parameters[name] = value
    return parameters


def _connect_arguments(parameters: dict[str, str]) -> dict[str, Any]:
    """The arguments of `asyncpg.connect` for parameters of a URL; any other parameter is refused."""
    settings = {"application_name": APPLICATION_NAME}
    arguments: dict[str, Any] = {"timeout": CONNECT_TIMEOUT_SECONDS, "target_session_attrs": "read-write"}
    dsn: dict[str, str] = {}
    for name, value in parameters.items():
        if name in _SERVER_SETTINGS:
            settings[name] = value
        elif name in _ASYNCPG_PARAMETERS:
            dsn[name] = value
        elif name == "connect_timeout":
            arguments["timeout"] = _timeout_seconds(value)
        elif name == "target_session_attrs":
            if value not in _WRITABLE:
                raise _refusal(f"{name}={value}: jobs are written, so it must be read-write or primary")
            if value == "primary":
                arguments[name] = value
        elif name == "channel_binding":
            if value == "require":
                raise _refusal(
                    "channel_binding=require is not supported; leave it out, and let sslmode=verify-full "
                    "with sslrootcert=system prove that the server is the right one"
                )
            if value not in ("disable", "prefer"):
                raise _refusal(f"channel_binding={value}: must be disable or prefer")
        elif name == "gssencmode" and value in ("disable", "prefer"):
            continue
        else:
            raise _refusal(f"parameter {name!r} is not supported")
    arguments |= _encryption(dsn)
    return {**arguments, "server_settings": settings}


def _encryption(dsn: dict[str, str]) -> dict[str, Any]:
    mode = dsn.get("sslmode")
    if dsn.get("sslrootcert") == "system":
        if mode not in (None, "verify-full"):
            raise _refusal(f"sslmode={mode} with sslrootcert=system: must be verify-full")
        for name in dsn.keys() - _BESIDE_SYSTEM_CERTIFICATES:
            raise _refusal(f"parameter {name!r} with sslrootcert=system is not supported")
        return {"ssl": _system_certificates(), **_dsn({n: v for n, v in dsn.items() if n == "passfile"})}
    for name in _SSL_FILES:
        if name in dsn:
            _require_file(name, dsn[name])
    return _dsn(dsn)


def _require_file(name: str, path: str) -> None:
    # The driver's own error does not say which file it is.
    try:
        if not Path(path).is_file():
            raise _refusal(f"{name}={path}: no such file")
        Path(path).open("rb").close()
    except OSError as error:
        raise _refusal(f"{name}={path}: {error.strerror}") from None


def _dsn(parameters: Mapping[str, str]) -> dict[str, str]:
    """The parameters that asyncpg takes from a URL only, as such a URL."""
    return {"dsn": f"postgresql:///?{urlencode(parameters, quote_via=quote)}"} if parameters else {}


def _system_certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])
    return context


def _timeout_seconds(text: str) -> float:
    """The timeout in seconds; 0 or less is the longest that is allowed (libpq: for ever)."""
    try:
        seconds = float(int(text))
    except (ValueError, OverflowError):
        raise _refusal(f"connect_timeout={text}: must be a number of seconds") from None
    return min(seconds, MAX_CONNECT_TIMEOUT_SECONDS) if seconds > 0 else MAX_CONNECT_TIMEOUT_SECONDS


def _hosts(authority: str, host_parameter: str, port_parameter: str) -> tuple[PostgresHost, ...]:
    """The hosts of a URL: `host:port,[::1]:port` before the path, or as the parameters host and port."""
    entries = _split_hosts(authority)
    ports = [port for _, port in entries]
    if host_parameter:
        entries = _split_hosts(host_parameter)
        own_ports = [port for _, port in entries]
        ports = own_ports if any(own_ports) or not any(ports) else ports
    if port_parameter:
        ports = [_port(port) for port in port_parameter.split(",")]
        entries = entries or [("localhost", None)]
    if len(ports) == 1:
        ports *= len(entries)
    if len(ports) != len(entries):
        raise _refusal(f"port: there are {len(ports)} of them for {len(entries)} hosts")
    if not all(host for host, _ in entries):
        raise _refusal("one of the hosts is empty")
    return tuple(
        PostgresHost(host, port or _DEFAULT_PORT) for (host, _), port in zip(entries, ports, strict=True)
    )


def _split_hosts(text: str) -> list[tuple[str, int | None]]:
    return [_split_port(entry) for entry in text.split(",")] if text else []


def _split_port(entry: str) -> tuple[str, int | None]:
    bracketed = re.fullmatch(r"\[([^\]]+)\](?::(.*))?", entry)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
    elif entry.startswith("/") or entry.count(":") > 1:
        # The folder of a socket, or an IPv6 address without brackets, as the parameter has them.
        host, port = entry, ""
    else:
        host, _, port = entry.partition(":")
    return unquote(host), _port(port) if port else None


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) <= _MAX_PORT:
        # Not the text: an unencoded password may end up here.
        raise _refusal(
            f"a port must be a number from 1 to {_MAX_PORT}, and special characters percent-encoded"
        )
    return int(text)


def _refusal(reason: str) -> ConfigurationError:
    return ConfigurationError(STORE_FLAG, reason)
