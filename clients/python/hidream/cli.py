"""The `hidream` command: its arguments, and what a shell sees of the outcome."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson

from hidream.client import Client
from hidream.connection import DEFAULT_ADDRESS, SERVICE_NAME
from hidream.errors import (
    HiDreamError,
    InternalError,
    InvalidArgumentError,
    NotServingError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from hidream.events import Event, ImageFinished, Preview, Started, Succeeded
from hidream.files import ImageFileFormat, OutputPattern, format_of_suffix, write_atomically
from hidream.health import HealthStatus
from hidream.terminal import ProgressBar, info_table, summary_line

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

_HELP = """Draws pictures with a hidream-grpc server.

Paths and answers go to stdout, everything else to stderr. Exit codes: 0 it worked; 1 it failed;
2 the command line or the request is wrong, one line a violation; 3 the server is unreachable, not
serving or full, try again later; 130 interrupted, the job is cancelled.
"""

_ARGUMENTS = {
    "spec.prompt": "PROMPT",
    "spec.negative_prompt": "--negative",
    "spec.width": "--size",
    "spec.height": "--size",
    "spec.num_inference_steps": "--steps",
    "spec.guidance_scale": "--guidance",
    "spec.num_images": "--images",
    "spec.seed": "--seed",
    "spec.output_format": "--format",
    "spec.quality": "--quality",
}

# No boxes and no colours: what goes wrong is one line, which a script can read too.
app = typer.Typer(
    name="hidream",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height of a picture, in pixels."""

    width: int | None = None
    height: int | None = None

    @classmethod
    def parse(cls, text: str) -> Size:
        """The size that `WIDTHxHEIGHT` says."""
        width, _, height = text.lower().partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise typer.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x768")
        return cls(int(width), int(height))


Address = Annotated[str, typer.Option(envvar="HIDREAM_ADDRESS", help="host:port of the server.")]
Token = Annotated[str | None, typer.Option(envvar="HIDREAM_TOKEN", help="Bearer token.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="File, pattern with {seed} and {index}, or folder. Without a pattern several pictures "
            "get their index behind the name. Default: hidream_{seed}.png.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first picture. Default: a random one.")] = None,
    size: Annotated[
        Size | None, typer.Option(parser=Size.parse, metavar="WIDTHxHEIGHT", help="In pixels.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; 1 or less is not at all.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to keep away from.")] = None,
    images: Annotated[
        int | None, typer.Option(help="How many pictures; each is drawn from the next seed.")
    ] = None,
    file_format: Annotated[
        ImageFileFormat | None, typer.Option("--format", help="Default: what --out ends in, or png.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of JPEG and WebP, 1 to 100.")] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="After each step write NAME.preview.jpg beside the picture.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print paths and errors only.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
) -> None:
    """Draw what a prompt says, and print the path of each picture."""
    size = size or Size()
    with exit_codes(address), Client(address, token=token) as client:
        file_format = _file_format(out, file_format)
        events = client.generate(
            prompt,
            timeout_seconds=timeout,
            negative_prompt=negative,
            width=size.width,
            height=size.height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images=images,
            seed=seed,
            output_format=file_format.output_format,
            quality=quality,
            preview=preview,
        )
        paths = _save_pictures(events, _output_pattern(out, file_format), images or 1, quiet)
        for path in paths:
            typer.echo(path)


def _save_pictures(
    events: Generator[Event], pattern: OutputPattern, num_images: int, is_quiet: bool
) -> list[Path]:
    paths: dict[int, Path] = {}
    seed = 0
    summary = ""
    # Closing the events cancels the job when anything here fails, an interrupt included.
    with closing(events), ProgressBar(is_shown=not is_quiet) as bar:
        for event in events:
            bar.show(event)
            match event:
                case Started():
                    seed = event.spec.seed
                case Preview():
                    write_atomically(pattern.preview_path(seed), event.data)
                case ImageFinished():
                    path = pattern.path_of(event.image, num_images)
                    write_atomically(path, event.image.data)
                    paths[event.image.index] = path
                case Succeeded():
                    summary = summary_line(event)
    if not is_quiet:
        typer.echo(summary, err=True)
    # Images come in the order in which they are finished.
    return [paths[index] for index in sorted(paths)]


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    timeout: Annotated[float, typer.Option(help="Give up after this many seconds.")] = 10.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
) -> None:
    """Describe the server: model, devices, load, defaults and limits."""
    with exit_codes(address), Client(address, token=token) as client:
        answer = client.info(timeout_seconds=timeout)
        if as_json:
            typer.echo(
                MessageToJson(
                    answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
            )
        else:
            typer.echo(info_table(answer))


@app.command()
def health(
    wait: Annotated[
        float | None, typer.Option(help="Wait up to this many seconds until the server serves.")
    ] = None,
    service: Annotated[str, typer.Option(help='Which service; "" is the server as a whole.')] = SERVICE_NAME,
    timeout: Annotated[float, typer.Option(help="Give up an answer after this many seconds.")] = 10.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
) -> None:
    """Print the server's health; exit code 0 only when it is SERVING."""
    with exit_codes(address), Client(address, token=token) as client:
        if wait is not None:
            client.wait_until_serving(wait, service=service)
        status = client.health(timeout_seconds=timeout, service=service)
        typer.echo(status)
        if status is not HealthStatus.SERVING:
            raise typer.Exit(EXIT_UNAVAILABLE)


@contextmanager
def exit_codes(address: str) -> Iterator[None]:
    """Within it, an error ends the command with its lines on stderr and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("hidream: interrupted", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except HiDreamError as error:
        for line in error_lines(error, address):
            typer.echo(f"hidream: {line}", err=True)
        raise typer.Exit(exit_code(error)) from None
    except OSError as error:
        typer.echo(f"hidream: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None


def exit_code(error: HiDreamError) -> int:
    """The exit code that the command's help promises for an error."""
    match error:
        case InvalidArgumentError():
            return EXIT_INVALID
        case UnavailableError() | ResourceExhaustedError() | NotServingError():
            return EXIT_UNAVAILABLE
        case _:
            return EXIT_FAILED


def error_lines(error: HiDreamError, address: str) -> list[str]:
    """What the command says of an error: a line for each bad argument, or one line."""
    if isinstance(error, InvalidArgumentError) and error.violations:
        return [
            f"{_ARGUMENTS.get(violation.field, 'the request')} ({violation.field}): {violation.description}"
            for violation in error.violations
        ]
    line = f"{address}: {error}"
    if isinstance(error, InternalError) and error.error_id not in str(error):
        line += f" (error id {error.error_id})"
    if isinstance(error, ServerError) and error.retry_after_seconds is not None:
        line += f"; try again in {error.retry_after_seconds:g} s"
    return [line]


def _file_format(out: str | None, file_format: ImageFileFormat | None) -> ImageFileFormat:
    if out is None or out.endswith("/") or Path(out).is_dir() or not Path(out).suffix:
        return file_format or ImageFileFormat.PNG
    named = format_of_suffix(Path(out).suffix)
    if named is None and file_format is None:
        known = ", ".join(ImageFileFormat)
        raise typer.BadParameter(f"{out!r} names none of {known}; say --format", param_hint="--out")
    if named and file_format and named is not file_format:
        raise typer.BadParameter(f"{out!r} is no name of a {file_format} file", param_hint="--out")
    return named or file_format or ImageFileFormat.PNG


def _output_pattern(out: str | None, file_format: ImageFileFormat) -> OutputPattern:
    try:
        return OutputPattern.from_option(out, file_format.suffix)
    except NotADirectoryError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


def main() -> None:
    """Entry point of the `hidream` command."""
    app()
