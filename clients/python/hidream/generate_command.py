"""The command that generates images while one waits."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hidream.client import Client
from hidream.command_line import GoingOn, connected, reconnect_policy
from hidream.events import ImageFinished
from hidream.files import ImageFileFormat, format_of_suffix
from hidream.generated_image import GeneratedImage
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
    going_on: GoingOn,
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw, unless --like says it.", show_default=False)
    ] = None,
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
    like: Annotated[
        GeneratedImage | None,
        typer.Option(
            parser=GeneratedImage.read_with_request,
            metavar="FILE",
            help="Draw what an image file says of itself again, but for what else is given, and say whether "
            "the bytes are the same.",
        ),
    ] = None,
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
    if prompt is None and like is None:
        raise typer.BadParameter("a prompt is missing, or --like", param_hint="PROMPT")
    size = size or Size()
    if file_format is None and like is not None:
        file_format = _format_for(out, like)
    file_format = picked_format(out, file_format)
    pattern = output_pattern(out, file_format, images, as_json)
    if pattern.is_stream and preview:
        text = f"previews are files beside that of the image, and {out!r} is none"
        raise typer.BadParameter(text, param_hint="--preview")
    given = {
        "prompt": prompt,
        "negative_prompt": negative,
        "width": size.width,
        "height": size.height,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "num_images": images,
        "seed": seed,
        "quality": quality,
        "model": model,
    }
    said = like.arguments(file_format) if like else {}
    start = partial(
        client.generate,
        **said | {name: value for name, value in given.items() if value is not None},
        output_format=file_format.output_format,
        preview=preview,
        priority=priority_name(priority),
        labels=labels_by_key(label),
        request_id=request_id,
        detached=detach,
    )
    saved, job_id, comparison = SavedImages(pattern), "", ""
    try:
        # Closing the events cancels the job when anything here fails, an interrupt included, unless the
        # connection is lost: then the display has told how to go on with it.
        with (
            progress_display(is_shown=not (quiet or as_json)) as display,
            closing(start(policy=reconnect_policy(timeout, reconnect, display, going_on))) as events,
        ):
            for event in events:
                job_id = event.job_id
                display.show(event)
                path = saved.take(event)
                if like and isinstance(event, ImageFinished) and event.image.index == 0:
                    comparison = like.compared_with(event.image.data)
                if as_json:
                    typer.echo(event_json_line(event, path))
    except KeyboardInterrupt:
        if detach and job_id:
            typer.echo(f"hidream: {going_on.line(job_id)}", err=True)
        raise
    if not as_json:
        for path in saved.paths:
            typer.echo(path)
    if comparison and not quiet:
        typer.echo(f"hidream: {comparison}", err=True)


def _format_for(out: str | None, like: GeneratedImage) -> ImageFileFormat | None:
    """The format of an image that is drawn again, where the name of its file says no other."""
    return None if out and format_of_suffix(Path(out).suffix) else like.file_format
