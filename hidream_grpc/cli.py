"""The `hidream-grpc` command: flags to settings, one clear line for whatever is wrong with them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from hidream_grpc.errors import ConfigurationError, HiDreamError, StartupError
from hidream_grpc.logs import LogConfig, configure_logging, log_unforeseen, one_line, place_of
from hidream_grpc.server.app import serve
from hidream_grpc.settings import Settings, describe_unknown_variables, flag_name, load_settings

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_STARTUP_ERROR = 2

app = typer.Typer(
    name="hidream-grpc",
    help="Serves a HiDream-I1 text-to-image model over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_SHORT_FLAGS = {
    "model_path": "-m",
    "extra_model_path": "-e",
    "devices": "-d",
    "device_type": "-t",
}


def _flags() -> list[inspect.Parameter]:
    """One optional flag for each setting, so that the two cannot differ; `Settings` reads the values."""
    parameters = []
    for name, field in Settings.model_fields.items():
        names = [flag_name(name), *([_SHORT_FLAGS[name]] if name in _SHORT_FLAGS else [])]
        default = "" if field.default is None else f" [default: {field.default}]"
        option = typer.Option(*names, help=f"{field.description}{default}", show_default=False)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[str | None, option],
            )
        )
    return parameters


def _serve_command(config: str | None = None, **flags: Any) -> None:
    """Load the model once, then serve until SIGTERM.

    Every flag is also an environment variable HIDREAM_<NAME>, and a key of the --config file.
    """
    try:
        settings = load_settings({k: v for k, v in flags.items() if v is not None}, config)
        _configure_logging(settings)
        if (unknown := describe_unknown_variables(os.environ)) is not None:
            logger.warning("%s", unknown)
        asyncio.run(serve(settings))
    except HiDreamError as error:
        typer.echo(f"hidream-grpc: {one_line(str(error))}", err=True)
        sys.exit(EXIT_STARTUP_ERROR if isinstance(error, StartupError) else EXIT_FAILED)
    except Exception as error:
        error_id = log_unforeseen(error)
        # Not its text, which may hold a password.
        typer.echo(
            f"hidream-grpc: internal error {error_id}: {type(error).__name__} in {place_of(error)}; "
            "the traceback is in --log-file, and here with --log-level DEBUG",
            err=True,
        )
        sys.exit(EXIT_FAILED)


def _configure_logging(settings: Settings) -> None:
    try:
        config = LogConfig(settings.log_level, settings.log_format, settings.log_file)
        configure_logging(config, may_start_threads=True)
    except OSError as error:
        reason = f"cannot append to {settings.log_file}: {error.strerror}"
        raise ConfigurationError("--log-file", reason) from None


_config_option = typer.Option("--config", help="TOML file with any of these settings", show_default=False)
_serve_command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        *_flags(),
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, _config_option],
        ),
    ]
)
app.command("serve")(_serve_command)


@app.callback()
def _commands() -> None:
    """Makes `serve` a command of its own, with room for others beside it."""


def run_command() -> NoReturn:
    """Do what the command line says; raises SystemExit with the exit code."""
    try:
        exit_code = app(prog_name="hidream-grpc", standalone_mode=False)
    except typer.TyperException as error:
        # Without a message the help was printed instead.
        if message := error.format_message():
            typer.echo(f"hidream-grpc: {' '.join(message.split())}", err=True)
        sys.exit(error.exit_code)
    sys.exit(exit_code)
