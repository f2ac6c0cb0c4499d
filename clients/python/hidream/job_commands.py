"""The commands about jobs: submit, batch, status, list, watch, cancel, delete, download."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from hidream.batch_lines import BatchLines
from hidream.client import Client
from hidream.command_line import (
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
from hidream.connection import DEFAULT_ADDRESS
from hidream.errors import InvalidArgumentError
from hidream.files import ImageFileFormat
from hidream.job_tables import job_table, jobs_table, state_name
from hidream.json_text import event_json_line, message_json, message_json_line
from hidream.pictures import SavedPictures, output_pattern, picked_format
from hidream.reconnecting import DEFAULT_RECONNECT_SECONDS, ReconnectPolicy
from hidream.requests import JobStateName, Priority
from hidream.terminal import ProgressBar
from hidream.v1 import image_pb2, job_pb2


class State(StrEnum):
    """States of jobs, as a command line names them."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class PriorityOption(StrEnum):
    """Priorities, as a command line names them."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Label:
    """One label of a job."""

    key: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Label:
        """The label that `KEY=VALUE` says."""
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
        return cls(key, value)


JobId = Annotated[str, typer.Argument(metavar="JOB_ID", show_default=False)]
JobIds = Annotated[list[str], typer.Argument(metavar="JOB_ID...", show_default=False)]
States = Annotated[
    list[State] | None,
    typer.Option("--state", help="Only jobs in this state; several times: in any of them."),
]
Labels = Annotated[
    list[Label] | None,
    typer.Option(
        "--label",
        parser=Label.parse,
        metavar="KEY=VALUE",
        help="Only jobs with it; several times: with all of them.",
    ),
]
Timeout = Annotated[float, typer.Option(help="Give up after this many seconds.")]
Reconnect = Annotated[
    float, typer.Option(help="When the connection is lost, try again for this many seconds.")
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="File, pattern with {seed} and {index}, or folder, as of `generate`."),
]


def submit(
    prompt: Prompt,
    seed: Seed = None,
    size: SizeOption = None,
    steps: Steps = None,
    guidance: Guidance = None,
    negative: Negative = None,
    images: Images = None,
    file_format: Annotated[ImageFileFormat | None, typer.Option("--format", help="Default: png.")] = None,
    quality: Quality = None,
    preview: Annotated[bool, typer.Option("--preview", help="Who watches it sees previews.")] = False,
    priority: Annotated[PriorityOption | None, typer.Option(help="Which jobs go first.")] = None,
    label: Annotated[
        list[Label] | None,
        typer.Option(
            "--label", parser=Label.parse, metavar="KEY=VALUE", help="To find it again; several times."
        ),
    ] = None,
    request_id: Annotated[
        str | None, typer.Option(help="A name for the request, so that a retry does not draw twice.")
    ] = None,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Queue a job, and print its id at once."""
    size = size or Size()
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
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
            priority=None if priority is None else cast(Priority, priority.name),
            labels=_labels(label),
            request_id=request_id,
        )
        typer.echo(message_json(job) if as_json else job.job_id)


def batch(
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="JSON Lines, one job a line. Default: stdin.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
    timeout: Timeout = 60.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Queue the jobs of a file, all or none, and print their ids in the order of the lines.

    A line is an object such as {"prompt": "a fox", "seed": 7, "width": 512, "height": 512,
    "labels": {"set": "foxes"}}: the names of the Python client.
    """
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        lines = sys.stdin.buffer.readlines() if file is None else file.read_bytes().splitlines()
        jobs = BatchLines.parse(lines)
        try:
            accepted = client.batch(jobs.requests, timeout_seconds=timeout)
        except InvalidArgumentError as error:
            raise jobs.refused(error) from error
        for job in accepted:
            typer.echo(message_json_line(job) if as_json else job.job_id)


def status(
    job_id: JobId,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Print a job as it is now."""
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        job = client.status(job_id, timeout_seconds=timeout)
        typer.echo(message_json(job) if as_json else job_table(job))


def list_jobs(
    state: States = None,
    label: Labels = None,
    page_size: Annotated[int, typer.Option(help="Jobs in one page; 0 is the server's default.")] = 0,
    page_token: Annotated[str, typer.Option(help="Where the page before said that more follows.")] = "",
    all_pages: Annotated[bool, typer.Option("--all", help="Every page from there on.")] = False,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Print one page of jobs, newest first; stderr says how to get the next."""
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        is_first = True
        while is_first or (all_pages and page_token):
            page = client.list_page(
                states=_state_names(state),
                labels=_labels(label),
                page_size=page_size,
                page_token=page_token,
                timeout_seconds=timeout,
            )
            lines = map(message_json_line, page.jobs) if as_json else jobs_table(page.jobs, is_first)
            for line in lines:
                typer.echo(line)
            is_first, page_token = False, page.next_page_token
        if page_token:
            typer.echo(f"hidream: more with --page-token {page_token}", err=True)


def watch(
    job_id: Annotated[
        str | None, typer.Argument(metavar="JOB_ID", help="Default: all jobs.", show_default=False)
    ] = None,
    out: Out = None,
    state: States = None,
    label: Labels = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every event, as a line of JSON.")] = False,
    reconnect: Reconnect = DEFAULT_RECONNECT_SECONDS,
    timeout: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Follow a job to its end, or every change of all jobs; neither is touched.

    A server that restarts meanwhile is waited for. With --out the pictures are written and their
    paths printed, otherwise the state in which the job ends.
    """
    if job_id is not None and (state or label):
        raise typer.BadParameter("--state and --label are for watching all jobs", param_hint="JOB_ID")
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        if job_id is None:
            _watch_all(client, state, label, as_json, ReconnectPolicy(timeout, reconnect))
            return
        with ProgressBar(is_shown=not (quiet or as_json)) as bar:
            policy = ReconnectPolicy(timeout, reconnect, bar.show_connection_lost)
            answer, summary = _watch_one(client, job_id, out, as_json, bar, policy)
        if not quiet and not as_json:
            typer.echo(summary, err=True)
        for line in answer:
            typer.echo(line)


def _watch_one(
    client: Client, job_id: str, out: str | None, as_json: bool, bar: ProgressBar, policy: ReconnectPolicy
) -> tuple[list[str], str]:
    spec = client.status(job_id, timeout_seconds=policy.timeout_seconds).spec
    pictures = SavedPictures(
        output_pattern(out, picked_format(out, _format(spec))), spec.num_images, spec.seed
    )
    with closing(client.watch(job_id, policy)) as events:
        for event in events:
            bar.show(event)
            if as_json:
                typer.echo(event_json_line(event))
            if out is not None:
                pictures.take(event)
    if as_json:
        return [], ""
    paths = [str(path) for path in pictures.paths]
    return paths if out is not None else ["SUCCEEDED"], pictures.summary


def _watch_all(
    client: Client,
    states: list[State] | None,
    labels: list[Label] | None,
    as_json: bool,
    policy: ReconnectPolicy,
) -> None:
    changes = client.watch_all(states=_state_names(states), labels=_labels(labels), policy=policy)
    with closing(changes):
        for change in changes:
            text = f"{change.time:%Y-%m-%d %H:%M:%S}  {change.job.job_id}  {state_name(change.job)}"
            typer.echo(message_json_line(change.job) if as_json else text)


def cancel(
    job_ids: JobIds,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Stop jobs at their next step, and print each with its state; one that has ended stays as it is."""
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        for job_id in job_ids:
            job = client.cancel(job_id, timeout_seconds=timeout)
            typer.echo(message_json_line(job) if as_json else f"{job.job_id} {state_name(job)}")


def delete(
    job_ids: JobIds,
    as_json: AsJson = False,
    timeout: Timeout = 10.0,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Delete jobs that have ended, and their pictures, and print the id of each."""
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        for job_id in job_ids:
            client.delete(job_id, timeout_seconds=timeout)
            typer.echo(message_json_line(job_pb2.Job(job_id=job_id)) if as_json else job_id)


def download(
    job_id: JobId,
    index: Annotated[
        list[int] | None, typer.Option(help="Which picture, from 0; several times. Default: all of them.")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
    reconnect: Reconnect = DEFAULT_RECONNECT_SECONDS,
    timeout: Annotated[float | None, typer.Option(help="Give up a picture after this many seconds.")] = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    ca_file: CaFile = None,
) -> None:
    """Write the pictures of a job, and print the path of each.

    What arrived of a picture before the download broke off is kept, and not asked for again.
    """
    with exit_codes(address), new_client(address, token, tls, ca_file) as client:
        job = client.status(job_id, timeout_seconds=timeout)
        pattern = output_pattern(out, picked_format(out, _format(job.spec)))
        for image_index in index or range(max(1, len(job.images))):
            place = image_pb2.ImageInfo(index=image_index, seed=job.spec.seed + image_index)
            path = pattern.path_of(place, job.spec.num_images)
            info = client.download(job_id, path, image_index, ReconnectPolicy(timeout, reconnect))
            typer.echo(message_json_line(info) if as_json else path)


def _format(spec: image_pb2.ImageSpec) -> ImageFileFormat:
    name = image_pb2.OutputFormat.Name(spec.output_format).removeprefix("OUTPUT_FORMAT_")
    return ImageFileFormat(name.lower())


def _state_names(states: list[State] | None) -> list[JobStateName]:
    return [cast(JobStateName, state.name) for state in states or ()]


def _labels(labels: list[Label] | None) -> dict[str, str]:
    return {label.key: label.value for label in labels or ()}


COMMANDS: dict[str, Callable[..., None]] = {
    "submit": submit,
    "batch": batch,
    "status": status,
    "list": list_jobs,
    "watch": watch,
    "cancel": cancel,
    "delete": delete,
    "download": download,
}
