"""The commands about the server itself: info, health."""

from __future__ import annotations

from typing import Annotated

import typer

from hidream.client import Client
from hidream.command_line import EXIT_UNAVAILABLE, connected
from hidream.connection import SERVICE_NAME
from hidream.health import HealthStatus
from hidream.info_table import info_table
from hidream.json_text import message_json
from hidream.options import AsJson, Timeout


@connected
def info(client: Client, as_json: AsJson = False, timeout: Timeout = 10.0) -> None:
    """Describe the server: model, devices, load, defaults and limits."""
    answer = client.info(timeout_seconds=timeout)
    typer.echo(message_json(answer) if as_json else info_table(answer))


@connected
def health(
    client: Client,
    wait: Annotated[
        float | None, typer.Option(help="Wait up to this many seconds until the server serves.")
    ] = None,
    service: Annotated[str, typer.Option(help='Which service; "" is the server as a whole.')] = SERVICE_NAME,
    timeout: Annotated[float, typer.Option(help="Give up an answer after this many seconds.")] = 10.0,
) -> None:
    """Print the server's health; exit code 0 only when it is SERVING."""
    if wait is not None:
        client.wait_until_serving(wait, service=service)
    status = client.health(timeout_seconds=timeout, service=service)
    typer.echo(status)
    if status is not HealthStatus.SERVING:
        raise typer.Exit(EXIT_UNAVAILABLE)
