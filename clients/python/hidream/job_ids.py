"""Job ids as people type them: whole, or their first characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import typer

from hidream.client import Client

_MIN_SHORT_CHARACTERS = 8
_PAGE_SIZE = 1_000
# A whole id has 32 of them, and needs no look.
_BEGINNING = re.compile(r"[0-9a-f]{4,31}")


def short_ids(job_ids: Sequence[str]) -> list[str]:
    """Return the first characters of each id, as many as tell all of them apart, and 8 at least."""
    num_characters = _MIN_SHORT_CHARACTERS
    while len({job_id[:num_characters] for job_id in job_ids}) < len(set(job_ids)):
        num_characters += 1
    return [job_id[:num_characters] for job_id in job_ids]


def whole_ids(client: Client, typed: Iterable[str], timeout_seconds: float | None) -> list[str]:
    """Return the ids that were typed, whole.

    What begins no id of the caller's jobs is returned as it is, for the server to say so.

    Raises:
        BadParameter: one begins the ids of several jobs.
        ServerError: the jobs cannot be listed.
    """
    typed = list(typed)
    beginnings = {text for text in typed if _BEGINNING.fullmatch(text)}
    found: dict[str, list[str]] = {text: [] for text in beginnings}
    page_token, is_first = "", True
    while beginnings and (is_first or page_token):
        page = client.list_page(page_size=_PAGE_SIZE, page_token=page_token, timeout_seconds=timeout_seconds)
        for job in page.jobs:
            for text in beginnings:
                if job.job_id.startswith(text):
                    found[text].append(job.job_id)
        page_token, is_first = page.next_page_token, False
    for text, job_ids in found.items():
        if len(job_ids) > 1:
            several = ", ".join(short_ids(job_ids))
            raise typer.BadParameter(f"{text!r} begins several jobs: {several}", param_hint="JOB_ID")
    return [found[text][0] if found.get(text) else text for text in typed]


def whole_id(client: Client, typed: str, timeout_seconds: float | None) -> str:
    """Return one id that was typed, whole; raises what `whole_ids` does."""
    return whole_ids(client, [typed], timeout_seconds)[0]
