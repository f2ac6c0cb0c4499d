"""The `hidream-grpc` command: flags to settings, one clear line for whatever is wrong with them."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from hidream_grpc import layout_table
from hidream_grpc.devices.detect import DEVICE_TYPE_FLAG
from hidream_grpc.devices.device_types import CUDA, DEVICE_TYPES, DeviceMemory, DeviceSpeed
from hidream_grpc.errors import ConfigurationError, HiDreamError, StartupError
from hidream_grpc.layout_table import PlannedDevices, PlannedModel
from hidream_grpc.logs import LogConfig, configure_logging, log_unforeseen, one_line, place_of
from hidream_grpc.model.checkpoint.prompt_lengths import MAX_PROMPT_TOKENS, TRAINED_PROMPT_TOKENS
from hidream_grpc.server.app import serve
from hidream_grpc.settings import Settings, describe_unknown_variables, flag_name, load_settings
from hidream_grpc.settings_help import help_of, help_words, type_words
from hidream_grpc.version import SERVER_VERSION

if TYPE_CHECKING:
    from typer._click import Context as ClickContext
    from typer._click import HelpFormatter

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_STARTUP_ERROR = 2

app = typer.Typer(
    name="hidream-grpc",
    add_completion=False,
    pretty_exceptions_enable=False,
    # Tables of rich cut long names.
    rich_markup_mode=None,
)

_SHORT_FLAGS = {
    "model_path": "-m",
    "extra_model_path": "-e",
    "devices": "-d",
    "device_type": "-t",
}


class _ServeCommand(TyperCommand):
    """The command whose help lists its flags by group, with whole names on a terminal of any width."""

    def format_options(self, ctx: ClickContext, formatter: HelpFormatter) -> None:
        """Write one section for each group, in the order of the flags."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if (record := option.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(option, "rich_help_panel", None) or "Other", []).append(record)
        indent = " " * 8
        for group, records in groups.items():
            with formatter.section(group):
                for names, words in records:
                    # The formatter itself would break `--data-dir` at its hyphens.
                    lines = textwrap.fill(
                        words,
                        formatter.width,
                        initial_indent=indent,
                        subsequent_indent=indent,
                        break_long_words=False,
                        break_on_hyphens=False,
                    )
                    formatter.write(f"  {names}\n{lines}\n")


def _flags() -> list[inspect.Parameter]:
    """One optional flag for each setting, so that the two cannot differ; `Settings` reads the values."""
    parameters = []
    for name, field in Settings.model_fields.items():
        option = typer.Option(
            *(flag for flag in (_SHORT_FLAGS.get(name), flag_name(name)) if flag),
            metavar=type_words(field),
            help=help_words(field),
            show_default=False,
            rich_help_panel=help_of(field).group,
        )
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

    A setting is a flag (--max-num-images 4), an environment variable (HIDREAM_MAX_NUM_IMAGES=4) or a key
    of the --config file (max_num_images=4). A flag goes before a variable, a variable before the file.
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


_config_option = typer.Option(
    "--config", metavar="PATH", help="TOML file with any of these settings", show_default=False
)
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
app.command("serve", cls=_ServeCommand, context_settings={"max_content_width": 100})(_serve_command)


def _plan_command(
    model_path: Annotated[
        Path | None,
        typer.Option("--model-path", "-m", help="folder of HiDream-I1 [default: HiDream-I1-Full]"),
    ] = None,
    extra_model_path: Annotated[
        Path | None, typer.Option("--extra-model-path", "-e", help="folder of Llama-3.1-8B-Instruct")
    ] = None,
    num_devices: Annotated[int, typer.Option(min=1, max=64, help="devices that there are")] = 1,
    device_type: Annotated[str, typer.Option(help="npu, cuda or cpu")] = CUDA.name,
    device_memory: Annotated[
        float,
        typer.Option(min=0.1, help="memory of each device that is free, in GB; on cpu that of the host"),
    ] = 80.0,
    host_memory: Annotated[float, typer.Option(min=0, help="memory of the host that is free, in GB")] = 256.0,
    max_step_pixels: Annotated[
        int, typer.Option(min=4096, help="width × height × samples of one forward of the transformer")
    ] = Settings.model_fields["max_step_pixels"].default,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=TRAINED_PROMPT_TOKENS, max=MAX_PROMPT_TOKENS, help="most tokens of a prompt")
    ] = Settings.model_fields["max_prompt_tokens"].default,
    teraflops: Annotated[
        float | None, typer.Option(min=0.001, help="TFLOP/s of a device [default: that of the type]")
    ] = None,
    gigabytes_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s that a device sends [default: that of the type]")
    ] = None,
    no_guidance: Annotated[
        bool, typer.Option("--no-guidance", help="one sample an image, as of Dev and Fast; else by the model")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of a table")] = False,
) -> None:
    """Show what each layout and format of weights needs and does, without loading a model.

    GB are those of the rank that needs most, for the largest step that the settings allow. TFLOP and GB sent
    are those of a rank in a step of one image. The time of that step, and the images a second of full steps,
    are relative to one device. Layouts that another one beats in everything are left out.
    """
    if device_type not in DEVICE_TYPES:
        words = f"{device_type!r} is none of {', '.join(DEVICE_TYPES)}"
        raise typer.BadParameter(words, param_hint=DEVICE_TYPE_FLAG)
    of_type = DEVICE_TYPES[device_type]
    device_bytes, host_bytes = (int(gigabytes * 1e9) for gigabytes in (device_memory, host_memory))
    try:
        model = (
            PlannedModel.released()
            if model_path is None
            else PlannedModel.from_checkpoint(model_path, extra_model_path)
        )
    except HiDreamError as error:
        typer.echo(f"hidream-grpc: {one_line(str(error))}", err=True)
        raise typer.Exit(EXIT_STARTUP_ERROR) from None
    speed = of_type.speed
    devices = PlannedDevices(
        device_type=of_type,
        num_devices=num_devices,
        device_memory=DeviceMemory(device_bytes, device_bytes),
        host_memory=DeviceMemory(host_bytes, host_bytes),
        speed=DeviceSpeed(
            speed.flops_per_second if teraflops is None else teraflops * 1e12,
            speed.bytes_per_second if gigabytes_per_second is None else gigabytes_per_second * 1e9,
        ),
        max_step_pixels=max_step_pixels,
        max_prompt_tokens=max_prompt_tokens,
    )
    model = replace(model, has_guidance=model.has_guidance and not no_guidance)
    rows = layout_table.layout_rows(model, devices)
    typer.echo(layout_table.as_json(model, rows).decode() if as_json else layout_table.as_text(rows))


app.command("plan")(_plan_command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"hidream-grpc {SERVER_VERSION}")
        raise typer.Exit


_version_option = typer.Option(
    "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
)


@app.callback(invoke_without_command=True)
def _commands(context: typer.Context, version: Annotated[bool, _version_option] = False) -> None:
    """Serves a HiDream-I1 text-to-image model over gRPC."""
    # It also makes `serve` a command of its own, with room for others beside it.
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_STARTUP_ERROR)


def run_command() -> NoReturn:
    """Do what the command line says; raises SystemExit with the exit code."""
    try:
        exit_code = app(prog_name="hidream-grpc", standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"hidream-grpc: {' '.join(error.format_message().split())}", err=True)
        sys.exit(error.exit_code)
    sys.exit(exit_code)
