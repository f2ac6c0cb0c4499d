"""The `hidream` command: its commands, in the order of the help."""

from __future__ import annotations

from typing import Annotated

import typer

from hidream import (
    __version__,
    job_commands,
    server_commands,
    show_command,
    submit_commands,
    watch_commands,
)
from hidream.command_line import EXIT_INVALID, CommandGroup
from hidream.generate_command import generate

_HELP = """Generates images with a hidream-grpc server.

Paths and answers go to stdout, everything else to stderr. Exit codes: 0 it worked; 1 it failed;
2 the command line or the request is wrong, one line a violation; 3 the server is unreachable, not
serving or full, try again later; 130 interrupted, and what `generate` draws is cancelled.
"""

# No boxes and no colours: what goes wrong is one line, which a script can read too.
app = typer.Typer(
    name="hidream",
    cls=CommandGroup,
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"hidream {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(EXIT_INVALID)


for name, command in {
    "generate": generate,
    "submit": submit_commands.submit,
    "batch": submit_commands.batch,
    "status": job_commands.status,
    "list": job_commands.list_jobs,
    "watch": watch_commands.watch,
    "cancel": job_commands.cancel,
    "delete": job_commands.delete,
    "download": watch_commands.download,
    "show": show_command.show,
    "info": server_commands.info,
    "health": server_commands.health,
}.items():
    app.command(name)(command)
