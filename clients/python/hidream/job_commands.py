"""The commands about jobs that are there: status, list, cancel, delete."""

from __future__ import annotations

from typing import Annotated

import typer

from hidream.client import Client
from hidream.command_line import connected
from hidream.job_ids import whole_id, whole_ids
from hidream.job_tables import job_table, jobs_table, state_name
from hidream.json_text import message_json, message_json_line
from hidream.options import AsJson, JobId, JobIds, Labels, States, Timeout, labels_by_key, state_names
from hidream.v1 import job_pb2


@connected
def status(client: Client, job_id: JobId, as_json: AsJson = False, timeout: Timeout = 10.0) -> None:
    """Print a job as it is now."""
    job = client.status(whole_id(client, job_id, timeout), timeout_seconds=timeout)
    typer.echo(message_json(job) if as_json else job_table(job))


@connected
def list_jobs(
    client: Client,
    state: States = None,
    label: Labels = None,
    page_size: Annotated[int, typer.Option(help="Jobs in one page; 0 is the server's default.")] = 0,
    page_token: Annotated[str, typer.Option(help="Where the page before said that more follows.")] = "",
    all_pages: Annotated[bool, typer.Option("--all", help="Every page from there on.")] = False,
    as_json: AsJson = False,
    timeout: Timeout = 30.0,
) -> None:
    """Print one page of jobs, newest first; stderr says how to get the next."""
    is_first = True
    while is_first or (all_pages and page_token):
        page = client.list_page(
            states=state_names(state),
            labels=labels_by_key(label),
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


@connected
def cancel(client: Client, job_ids: JobIds, as_json: AsJson = False, timeout: Timeout = 10.0) -> None:
    """Stop jobs at their next step, and print each with its state; one that has ended stays as it is."""
    for job_id in whole_ids(client, job_ids, timeout):
        job = client.cancel(job_id, timeout_seconds=timeout)
        typer.echo(message_json_line(job) if as_json else f"{job.job_id} {state_name(job)}")


@connected
def delete(client: Client, job_ids: JobIds, as_json: AsJson = False, timeout: Timeout = 10.0) -> None:
    """Delete jobs that have ended, and their images, and print the id of each."""
    for job_id in whole_ids(client, job_ids, timeout):
        client.delete(job_id, timeout_seconds=timeout)
        typer.echo(message_json_line(job_pb2.Job(job_id=job_id)) if as_json else job_id)
