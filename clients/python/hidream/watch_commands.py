"""The commands that go on through lost connections and restarts of the server: watch, download."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from hidream.client import Client
from hidream.command_line import GoingOn, connected, reconnect_policy
from hidream.files import ImageFileFormat
from hidream.job_ids import whole_id
from hidream.job_tables import state_name
from hidream.json_text import event_json_line, message_json_line
from hidream.options import (
    AsJson,
    EventsAsJson,
    JobId,
    Label,
    Labels,
    NoTimeout,
    Quiet,
    Reconnect,
    State,
    States,
    labels_by_key,
    state_names,
)
from hidream.progress import progress_display
from hidream.reconnecting import DEFAULT_RECONNECT_SECONDS, ReconnectPolicy
from hidream.saved_images import SavedImages, output_pattern, picked_format
from hidream.v1 import image_pb2

Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="File, pattern with {seed} and {index}, folder or -, as of `generate`."),
]


@connected
def watch(
    client: Client,
    going_on: GoingOn,
    job_id: Annotated[
        str | None, typer.Argument(metavar="JOB_ID", help="Default: all jobs.", show_default=False)
    ] = None,
    out: Out = None,
    state: States = None,
    label: Labels = None,
    quiet: Quiet = False,
    as_json: EventsAsJson = False,
    reconnect: Reconnect = DEFAULT_RECONNECT_SECONDS,
    timeout: NoTimeout = None,
) -> None:
    """Follow a job to its end, or every change of all jobs; neither is touched.

    A server that restarts meanwhile is waited for. With --out the images are written and their
    paths printed, otherwise the state in which the job ends.
    """
    if job_id is None:
        if out is not None:
            raise typer.BadParameter("it is for watching one job", param_hint="--out")
        _watch_all(client, state, label, as_json, ReconnectPolicy(timeout, reconnect))
        return
    if state or label:
        raise typer.BadParameter("--state and --label are for watching all jobs", param_hint="JOB_ID")
    job_id = whole_id(client, job_id, timeout)
    saved = None if out is None else _saved_images(client, job_id, out, as_json, timeout)
    with progress_display(is_shown=not (quiet or as_json)) as display:
        policy = reconnect_policy(timeout, reconnect, display, going_on)
        with closing(client.watch(job_id, policy)) as events:
            for event in events:
                display.show(event)
                path = saved.take(event) if saved else None
                if as_json:
                    typer.echo(event_json_line(event, path))
    if as_json:
        return
    for line in saved.paths if saved else ["SUCCEEDED"]:
        typer.echo(line)


def _saved_images(
    client: Client, job_id: str, out: str, as_json: bool, timeout_seconds: float | None
) -> SavedImages:
    spec = client.status(job_id, timeout_seconds=timeout_seconds).spec
    pattern = output_pattern(out, picked_format(out, _format(spec)), spec.num_images, as_json)
    return SavedImages(pattern, spec.num_images, spec.seed)


def _watch_all(
    client: Client,
    states: list[State] | None,
    labels: list[Label] | None,
    as_json: bool,
    policy: ReconnectPolicy,
) -> None:
    changes = client.watch_all(states=state_names(states), labels=labels_by_key(labels), policy=policy)
    with closing(changes):
        for change in changes:
            text = f"{change.time:%Y-%m-%d %H:%M:%S}  {change.job.job_id}  {state_name(change.job)}"
            typer.echo(message_json_line(change.job) if as_json else text)


@connected
def download(
    client: Client,
    job_id: JobId,
    index: Annotated[
        list[int] | None, typer.Option(help="Which image, from 0; several times. Default: all of them.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    reconnect: Reconnect = DEFAULT_RECONNECT_SECONDS,
    timeout: Annotated[float | None, typer.Option(help="Give up an image after this many seconds.")] = None,
) -> None:
    """Write the images of a job, and print the path of each.

    What arrived of an image before the download broke off is kept, and not asked for again.
    """
    job = client.status(whole_id(client, job_id, timeout), timeout_seconds=timeout)
    indices = index or range(job.spec.num_images)
    pattern = output_pattern(out, picked_format(out, _format(job.spec)), len(indices), as_json)
    for image_index in indices:
        place = image_pb2.ImageInfo(index=image_index, seed=job.spec.seed + image_index)
        path = pattern.path_of(place, job.spec.num_images)
        info = client.download(job.job_id, path, image_index, ReconnectPolicy(timeout, reconnect))
        if not pattern.is_stdout:
            typer.echo(message_json_line(info) if as_json else path)


def _format(spec: image_pb2.ImageSpec) -> ImageFileFormat:
    name = image_pb2.OutputFormat.Name(spec.output_format).removeprefix("OUTPUT_FORMAT_")
    return ImageFileFormat(name.lower())
