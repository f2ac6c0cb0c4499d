"""The `hidream` command: its arguments, and what a shell sees of the outcome."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from hidream import job_commands, submit_commands, watch_commands
from hidream.client import Client
from hidream.command_line import EXIT_UNAVAILABLE, connected
from hidream.connection import SERVICE_NAME
from hidream.files import ImageFileFormat
from hidream.health import HealthStatus
from hidream.json_text import message_json
from hidream.options import (
    AsJson,
    Guidance,
    Images,
    Model,
    Negative,
    NoTimeout,
    Prompt,
    Quality,
    Quiet,
    Seed,
    Size,
    SizeOption,
    Steps,
    Timeout,
)
from hidream.saved_images import SavedImages, output_pattern, picked_format
from hidream.terminal import ProgressBar, info_table

_HELP = """Draws images with a hidream-grpc server.

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


@connected
def generate(
    client: Client,
    prompt: Prompt,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="File, pattern with {seed} and {index}, folder, or - for stdout. Without a pattern several "
            "images get their index behind the name. Default: hidream_{seed}.png.",
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
        bool, typer.Option("--preview", help="After each step write NAME.preview.jpg beside the image.")
    ] = False,
    model: Model = None,
    quiet: Quiet = False,
    timeout: NoTimeout = None,
) -> None:
    """Draw what a prompt says, and print the path of each image."""
    size = size or Size()
    file_format = picked_format(out, file_format)
    pattern = output_pattern(out, file_format, images)
    if preview and pattern.is_stream:
        raise typer.BadParameter(
            f"previews are files beside that of the image, and {out!r} is none", param_hint="--preview"
        )
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
        model=model,
    )
    # Closing the events cancels the job when anything here fails, an interrupt included.
    with closing(events), ProgressBar(is_shown=not quiet) as bar:
        saved = SavedImages(pattern)
        for event in events:
            bar.show(event)
            saved.take(event)
    for path in saved.paths:
        typer.echo(path)


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


# In the order of the help.
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
    "info": info,
    "health": health,
}.items():
    app.command(name)(command)


def main() -> None:
    """Entry point of the `hidream` command."""
    app()
