"""The `hidream` command: its arguments, and what a shell sees of the outcome."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from hidream import job_commands
from hidream.command_line import (
    EXIT_UNAVAILABLE,
    Address,
    AsJson,
    CaFile,
    Guidance,
    Images,
    Negative,
    Prompt,
    Quality,
    Quiet,
    Seed,
    Size,
    SizeOption,
    Steps,
    Token,
    UseTls,
    exit_codes,
    new_client,
)
from hidream.connection import DEFAULT_ADDRESS, SERVICE_NAME
from hidream.files import ImageFileFormat
from hidream.health import HealthStatus
from hidream.json_text import message_json
from hidream.pictures import SavedPictures, output_pattern, picked_format
from hidream.terminal import ProgressBar, info_table

_HELP = """Draws pictures with a hidream-grpc server.

Paths and answers go to stdout, everything else to stderr. Exit codes: 0 it worked; 1 it failed;
2 the command line or the request is wrong, one line a violation; 3 the server is unreachable, not
serving or full, try again later; 130 interrupted, and what `generate` draws is cancelled.
"""

# No boxes and no colours: what goes wrong is one line, which a script can read too.
app = typer.Typer(
    name="hidream",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def generate(
    prompt: Prompt,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="File, pattern with {seed} and {index}, or folder. Without a pattern several pictures "
            "get their index behind the name. Default: hidream_{seed}.png.",
        ),
    ] = None,
    seed: Seed = None,
    size: SizeOption = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    images: Images = None,
    file_format: Annotated[
        ImageFileFormat | None, typer.Option("--format", help="Default: what --out ends in, or png.")
    ] = None,
    quality: Quality = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="After each step write NAME.preview.jpg beside the picture.")
    ] = False,
    quiet: Quiet = False,
    timeout: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Draw what a prompt says, and print the path of each picture."""
    size = size or Size()
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        file_format = picked_format(out, file_format)
        pattern = output_pattern(out, file_format)
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
        # Closing the events cancels the job when anything here fails, an interrupt included.
        with closing(events), ProgressBar(is_shown=not quiet) as bar:
            pictures = SavedPictures(pattern, images or 1)
            for event in events:
                bar.show(event)
                pictures.take(event)
        if not quiet:
            typer.echo(pictures.summary, err=True)
        for path in pictures.paths:
            typer.echo(path)


@app.command()
def info(
    as_json: AsJson = False,
    timeout: Annotated[float, typer.Option(help="Give up after this many seconds.")] = 10.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Describe the server: model, devices, load, defaults and limits."""
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        answer = client.info(timeout_seconds=timeout)
        if as_json:
            typer.echo(message_json(answer))
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
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Print the server's health; exit code 0 only when it is SERVING."""
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        if wait is not None:
            client.wait_until_serving(wait, service=service)
        status = client.health(timeout_seconds=timeout, service=service)
        typer.echo(status)
        if status is not HealthStatus.SERVING:
            raise typer.Exit(EXIT_UNAVAILABLE)


for name, command in job_commands.COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    """Entry point of the `hidream` command."""
    app()
