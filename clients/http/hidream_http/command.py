"""The `hidream-http` command: flags to settings, and one line for whatever is wrong with them."""

from __future__ import annotations

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hidream.connection import DEFAULT_ADDRESS, Tls
from hidream_http import __version__
from hidream_http.logs import configure_logging, one_line
from hidream_http.parent import PARENT_FLAG, end_with_parent
from hidream_http.serving import serve
from hidream_http.settings import DEFAULT_LISTEN, SettingError, Settings
from hidream_http.tls import tls_files

EXIT_INVALID = 2
ENVIRONMENT_PREFIX = "HIDREAM_HTTP_"
_DEFAULTS = Settings()
SERVER_CERTIFICATE_FLAG = "--server-certificate"
SERVER_KEY_FLAG = "--server-key"

app = typer.Typer(
    name="hidream-http",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Tables of rich cut long names.
    rich_markup_mode=None,
)


class LogLevel(StrEnum):
    """Levels of the log."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class LogFormat(StrEnum):
    """Lines for people, or one JSON object a line."""

    TEXT = "text"
    JSON = "json"


def _flag(name: str, help_text: str, **options: Any) -> Any:
    """A flag that a variable stands for too: `--max-body-bytes`, `HIDREAM_HTTP_MAX_BODY_BYTES`."""
    variable = ENVIRONMENT_PREFIX + name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(name, envvar=variable, show_envvar=False, help=help_text, **options)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"hidream-http {__version__}")
        raise typer.Exit


@app.command(context_settings={"max_content_width": 100})
def _serve(
    server: Annotated[
        str, _flag("--server", "The gRPC server: host, host:port, or a URL with http:// or https://.")
    ] = DEFAULT_ADDRESS,
    server_ca: Annotated[
        Path | None,
        _flag("--server-ca", "PEM file of the authorities that vouch for the server; implies TLS."),
    ] = None,
    server_certificate: Annotated[
        Path | None,
        _flag(SERVER_CERTIFICATE_FLAG, "PEM file that proves to the server who calls, with --server-key."),
    ] = None,
    server_key: Annotated[
        Path | None, _flag(SERVER_KEY_FLAG, "PEM file with the key of --server-certificate.")
    ] = None,
    listen: Annotated[
        str, _flag("--listen", "Where to serve HTTP; port 0 takes a free one.", metavar="HOST:PORT")
    ] = DEFAULT_LISTEN,
    tls_certificate: Annotated[
        Path | None,
        _flag("--tls-certificate", "PEM file of the bridge's certificate and what is between it and its CA."),
    ] = None,
    tls_key: Annotated[
        Path | None, _flag("--tls-key", "PEM file with the key of --tls-certificate, without a passphrase.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        _flag("--tls-client-ca", "PEM file of authorities; every caller needs a certificate of one of them."),
    ] = None,
    cors_origins: Annotated[
        str | None,
        _flag(
            "--cors-origins",
            "Origins whose pages may call, such as https://a.example,https://b.example, or *.",
        ),
    ] = None,
    max_body_bytes: Annotated[
        int, _flag("--max-body-bytes", "Largest body of a request.", min=1)
    ] = _DEFAULTS.max_body_bytes,
    timeout_seconds: Annotated[
        float, _flag("--timeout-seconds", "Deadline of calls with one answer that name none.", min=0.001)
    ] = _DEFAULTS.timeout_seconds,
    drain_seconds: Annotated[
        float, _flag("--drain-seconds", "Time after SIGTERM in which running requests may end.", min=0)
    ] = _DEFAULTS.drain_seconds,
    parent_pid: Annotated[
        int | None, typer.Option(PARENT_FLAG, help="Drain and end when this process, which started it, ends.")
    ] = None,
    log_level: Annotated[LogLevel, _flag("--log-level", "What to log.")] = LogLevel.INFO,
    log_format: Annotated[LogFormat, _flag("--log-format", "How to log.")] = LogFormat.TEXT,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Serve a hidream-grpc server over HTTP until SIGTERM; its address is the one line on stdout.

    Each flag is a variable too: --max-body-bytes is HIDREAM_HTTP_MAX_BODY_BYTES. A flag goes before it.
    """
    settings = Settings(
        server=server,
        server_tls=_server_tls(server_ca, server_certificate, server_key),
        listen=listen,
        tls=tls_files(tls_certificate, tls_key, tls_client_ca),
        cors_origins=_origins(cors_origins),
        max_body_bytes=max_body_bytes,
        timeout_seconds=timeout_seconds,
        drain_seconds=drain_seconds,
    )
    if parent_pid is not None:
        end_with_parent(parent_pid)
    configure_logging(log_level.value, as_json=log_format is LogFormat.JSON)
    asyncio.run(serve(settings, typer.echo))


def _server_tls(ca: Path | None, certificate: Path | None, key: Path | None) -> Tls | None:
    if certificate is not None and key is None:
        raise SettingError(SERVER_CERTIFICATE_FLAG, f"needs {SERVER_KEY_FLAG}")
    if key is not None and certificate is None:
        raise SettingError(SERVER_KEY_FLAG, f"needs {SERVER_CERTIFICATE_FLAG}")
    if ca is None and certificate is None:
        return None
    return Tls(
        _pem(ca, "--server-ca", "CERTIFICATE"),
        _pem(key, SERVER_KEY_FLAG, "PRIVATE KEY"),
        _pem(certificate, SERVER_CERTIFICATE_FLAG, "CERTIFICATE"),
    )


def _pem(path: Path | None, flag: str, kind: str) -> bytes | None:
    """What a file holds; SettingError where gRPC would only say that it could not connect."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingError(flag, f"{path}: {error.strerror}") from None
    if f"{kind}-----".encode() not in content:
        raise SettingError(flag, f"{path}: holds no {kind.lower()} in PEM")
    return content


def _origins(text: str | None) -> tuple[str, ...]:
    origins = tuple(origin.strip() for origin in (text or "").split(",")) if text else ()
    for origin in origins:
        scheme, _, rest = origin.partition("://")
        if origin != "*" and (scheme not in ("http", "https") or not rest or "/" in rest):
            raise SettingError("--cors-origins", f"{origin!r} is no origin, such as https://a.example, nor *")
    return origins


def _refuse_empty(arguments: list[str]) -> None:
    """An unset `$CERTIFICATE` of a script must not become a bridge without TLS."""
    for name, value in os.environ.items():
        if name.startswith(ENVIRONMENT_PREFIX) and not value.strip():
            raise SettingError(name, "is empty; leave it out to have its default")
    for flag, value in zip(arguments, [*arguments[1:], "-"], strict=True):
        if flag.startswith("--") and not value.strip():
            raise SettingError(flag, "is empty; leave it out to have its default")


def main() -> None:
    """Do what the command line says, and end the process with its exit code."""
    try:
        _refuse_empty(sys.argv[1:])
        code = app(prog_name="hidream-http", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"hidream-http: {' '.join(error.format_message().split())}", err=True)
        code = error.exit_code
    except SettingError as error:
        typer.echo(f"hidream-http: {one_line(str(error))}", err=True)
        code = EXIT_INVALID
    sys.exit(code)
