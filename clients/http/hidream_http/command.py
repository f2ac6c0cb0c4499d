"""The `hidream-http` command: flags to settings, and one line for whatever is wrong with them."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Annotated

import typer

from hidream.connection import DEFAULT_ADDRESS
from hidream_http import __version__
from hidream_http.serving import serve
from hidream_http.settings import DEFAULT_LISTEN, SettingError, Settings

EXIT_FAILED = 1
EXIT_INVALID = 2

app = typer.Typer(
    name="hidream-http",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"hidream-http {__version__}")
        raise typer.Exit


@app.command()
def _serve(
    server: Annotated[
        str, typer.Option(help="Of the gRPC server: host, host:port, or a URL with http:// or https://.")
    ] = DEFAULT_ADDRESS,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where to serve HTTP; port 0 takes a free one.")
    ] = DEFAULT_LISTEN,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve a hidream-grpc server over HTTP until SIGTERM."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    asyncio.run(serve(Settings(server=server, listen=listen)))


def main() -> None:
    """Do what the command line says, and end the process with its exit code."""
    try:
        code = app(prog_name="hidream-http", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"hidream-http: {' '.join(error.format_message().split())}", err=True)
        code = error.exit_code
    except SettingError as error:
        typer.echo(f"hidream-http: {error}", err=True)
        code = EXIT_INVALID
    sys.exit(code)
