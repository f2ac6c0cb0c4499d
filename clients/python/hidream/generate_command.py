"""The command that generates images while one waits."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import Annotated

import typer

from hidream.client import Client
from hidream.command_line import GoingOn, connected, reconnect_policy
from hidream.files import ImageFileFormat
from hidream.json_text import event_json_line
from hidream.options import (
    EventsAsJson,
    Guidance,
    Images,
    JobLabels,
    Model,
    Negative,
    NoTimeout,
    PriorityOption,
    Prompt,
    Quality,
    Quiet,
    Reconnect,
    RequestId,
    Seed,
    Size,
    SizeOption,
    Steps,
    labels_by_key,
    priority_name,
)
from hidream.progress import progress_display
from hidream.reconnecting import DEFAULT_RECONNECT_SECONDS
from hidream.saved_images import SavedImages, output_pattern, picked_format


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
    priority: PriorityOption = None,
    label: JobLabels = None,
    request_id: RequestId = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Let the job go on when this command ends early.")
    ] = False,
    model: Model = None,
    quiet: Quiet = False,
    as_json: EventsAsJson = False,
    reconnect: Reconnect = DEFAULT_RECONNECT_SECONDS,
    timeout: NoTimeout = None,
) -> None:
    """Generate what a prompt says, and print the path of each image.

    A server that restarts or falls silent meanwhile is waited for, and the same job goes on.
    """
    size = size or Size()
    file_format = picked_format(out, file_format)
    pattern = output_pattern(out, file_format, images, as_json)
    if pattern.is_stream and preview:
        text = f"previews are files beside that of the image, and {out!r} is none"
        raise typer.BadParameter(text, param_hint="--preview")
    start = partial(
        client.generate,
        prompt,
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
        priority=priority_name(priority),
        labels=labels_by_key(label),
        request_id=request_id,
        detached=detach,
        model=model,
    )
    going_on = GoingOn.after("generate", out, client.address)
    saved, job_id = SavedImages(pattern), ""
    try:
        # Closing the events cancels the job when anything here fails, an interrupt included.
        with (
            progress_display(is_shown=not (quiet or as_json)) as display,
            closing(start(policy=reconnect_policy(timeout, reconnect, display, going_on))) as events,
        ):
            for event in events:
                job_id = event.job_id
                display.show(event)
                path = saved.take(event)
                if as_json:
                    typer.echo(event_json_line(event, path))
    except KeyboardInterrupt:
        if detach and job_id:
            typer.echo(f"hidream: job {job_id} goes on: hidream watch {job_id}", err=True)
        raise
    if not as_json:
        for path in saved.paths:
            typer.echo(path)
