"""What all commands share: arguments, and what a shell sees when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hidream.batch_lines import InvalidLinesError
from hidream.client import Client
from hidream.connection import Tls
from hidream.errors import (
    HiDreamError,
    InternalError,
    InvalidArgumentError,
    NotServingError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

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
    "request_id": "--request-id",
    "priority": "--priority",
    "labels": "--label",
    "page_size": "--page-size",
    "page_token": "--page-token",
    "job_id": "JOB_ID",
    "image_index": "--index",
}


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
Token = Annotated[
    str | None,
    typer.Option(envvar="HIDREAM_TOKEN", show_envvar=True, help="Bearer token; better by its variable."),
]
UseTls = Annotated[bool, typer.Option("--tls", envvar="HIDREAM_TLS", help="Encrypt the connection.")]
CaFile = Annotated[
    Path | None,
    typer.Option(
        envvar="HIDREAM_CA_FILE", help="PEM file of who vouches for the server, in place of the public ones."
    ),
]
Prompt = Annotated[str, typer.Argument(help="What to draw.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Of the first picture. Default: a random one.")]
SizeOption = Annotated[
    Size | None, typer.Option(parser=Size.parse, metavar="WIDTHxHEIGHT", help="In pixels.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[
    float | None, typer.Option(help="How closely to follow the prompt; 1 or less is not at all.")
]
Negative = Annotated[str | None, typer.Option(help="What to keep away from.")]
Images = Annotated[int | None, typer.Option(help="How many pictures; each is drawn from the next seed.")]
Quality = Annotated[int | None, typer.Option(help="Of JPEG and WebP, 1 to 100.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print paths and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]


def new_client(address: str, token: str | None, use_tls: bool, ca_file: Path | None) -> Client:
    """The client that the options of a command describe."""
    if ca_file is not None:
        return Client(address, token=token, tls=Tls(root_certificates=ca_file.read_bytes()))
    return Client(address, token=token, tls=Tls() if use_tls else None)


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
        case InvalidArgumentError() | InvalidLinesError():
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
    if isinstance(error, InvalidLinesError):
        return [
            f"line {violation.line_number}, {violation.field}: {violation.description}"
            if violation.field
            else f"line {violation.line_number}: {violation.description}"
            for violation in error.violations
        ]
    line = f"{address}: {error}"
    if isinstance(error, InternalError) and error.error_id not in str(error):
        line += f" (error id {error.error_id})"
    if isinstance(error, ServerError) and error.retry_after_seconds is not None:
        line += f"; try again in {error.retry_after_seconds:g} s"
    return [line]
