"""The commands that queue jobs: submit, batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hidream.batch_lines import BatchLines
from hidream.client import Client
from hidream.command_line import connected
from hidream.errors import InvalidArgumentError
from hidream.files import ImageFileFormat
from hidream.json_text import message_json, message_json_line
from hidream.options import (
    AsJson,
    Guidance,
    Images,
    JobLabels,
    Model,
    Negative,
    PriorityOption,
    Prompt,
    Quality,
    RequestId,
    Seed,
    Size,
    SizeOption,
    Steps,
    Timeout,
    labels_by_key,
    priority_name,
)


@connected
def submit(
    client: Client,
    prompt: Prompt,
    seed: Seed = None,
    size: SizeOption = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    images: Images = None,
    file_format: Annotated[ImageFileFormat | None, typer.Option("--format", help="Default: png.")] = None,
    quality: Quality = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Send previews to those that watch the job.")
    ] = False,
    priority: PriorityOption = None,
    label: JobLabels = None,
    request_id: RequestId = None,
    model: Model = None,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Queue a job, and print its id at once."""
    size = size or Size()
    job = client.submit(
        prompt,
        timeout_seconds=timeout,
        negative_prompt=negative,
        width=size.width,
        height=size.height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images=images,
        seed=seed,
        output_format=None if file_format is None else file_format.output_format,
        quality=quality,
        preview=preview,
        priority=priority_name(priority),
        labels=labels_by_key(label),
        request_id=request_id,
        model=model,
    )
    typer.echo(message_json(job) if as_json else job.job_id)


@connected
def batch(
    client: Client,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="JSON Lines, one job a line. Default: stdin.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model draws the lines that name none. Default: the server's.")
    ] = None,
    as_json: AsJson = False,
    timeout: Timeout = 60.0,
) -> None:
    """Queue the jobs of a file, all or none, and print their ids in the order of the lines.

    A line is an object such as {"prompt": "a fox", "seed": 7, "width": 512, "height": 512,
    "labels": {"set": "foxes"}}: the names of the Python client.
    """
    lines = sys.stdin.buffer.readlines() if file is None else file.read_bytes().splitlines()
    jobs = BatchLines.parse(lines, default_model=model)
    try:
        accepted = client.batch(jobs.requests, timeout_seconds=timeout)
    except InvalidArgumentError as error:
        raise jobs.refused(error) from error
    for job in accepted:
        typer.echo(message_json_line(job) if as_json else job.job_id)
