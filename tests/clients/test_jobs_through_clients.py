"""Jobs through the typed clients, in Python and in Go, against the live service."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from hidream.events import ImageFinished, Progress
from hidream.requests import submit_request
from hidream.v1 import job_pb2
from tests.clients.conftest import GoTools
from tests.support.live_server import LiveServer, wait_until

PROMPT = "a red circle on a blue background"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 11}
# Longer than any test waits for, so that only cancelling can end it.
LONG: dict[str, Any] = {**SMALL, "num_inference_steps": 150, "num_images": 4}


def has_ended(client: Client, job_id: str) -> bool:
    return client.status(job_id).HasField("end_time")


def test_a_submitted_job_is_watched_and_downloaded_as_generate_would_draw_it(
    client: Client, tmp_path: Path
) -> None:
    job = client.submit(PROMPT, **SMALL)
    events = list(client.watch(job))
    ended = client.wait(job)
    assert ended == client.status(job)
    assert [event.step for event in events if isinstance(event, Progress)][-1] == 3
    [image] = [event.image for event in events if isinstance(event, ImageFinished)]
    assert [bytes(info.sha256) for info in ended.images] == [image.sha256]
    info = client.download(ended, str(tmp_path / "a.png"))
    assert (info.sha256, info.seed) == (image.sha256, 11)
    assert (tmp_path / "a.png").read_bytes() == image.data
    assert client.draw(PROMPT, **SMALL) == [image]


async def test_asyncio_has_the_same_calls(server: LiveServer, tmp_path: Path) -> None:
    labels = {"test": uuid.uuid4().hex}
    async with AsyncClient(server.address) as client:
        [first, second] = await client.batch(
            [submit_request(PROMPT, **SMALL, labels=labels), submit_request(PROMPT, **LONG, labels=labels)]
        )
        images = [e.image async for e in client.watch(first.job_id) if isinstance(e, ImageFinished)]
        await client.download(first.job_id, tmp_path / "a.png")
        assert [image.data for image in images] == [(tmp_path / "a.png").read_bytes()]
        listed = [job.job_id async for job in client.list_jobs(labels=labels)]
        assert sorted(listed) == sorted([first.job_id, second.job_id])
        with pytest.raises(FailedPreconditionError):
            await client.delete(second.job_id)
        await client.cancel(second.job_id)
        async for change in client.watch_all(labels=labels, states=["CANCELLED"]):
            assert change.job.job_id == second.job_id
            break
        assert (await client.status(second.job_id)).state == job_pb2.JOB_STATE_CANCELLED
        await client.delete(second.job_id)
        with pytest.raises(NotFoundError):
            await client.status(second.job_id)


def test_a_batch_with_one_bad_request_is_refused_as_a_whole_and_names_it(client: Client) -> None:
    labels = {"test": uuid.uuid4().hex}
    good, bad = ({**SMALL, "labels": labels}, {**SMALL, "width": 65, "labels": labels})
    with pytest.raises(InvalidArgumentError) as caught:
        client.batch([submit_request(PROMPT, **good), submit_request(PROMPT, **bad)])
    assert [violation.field for violation in caught.value.violations] == ["requests[1].spec.width"]
    assert list(client.list_jobs(labels=labels)) == []


def test_leaving_a_watch_does_not_touch_the_job(client: Client) -> None:
    job = client.submit(PROMPT, **LONG)
    try:
        watch = client.watch(job.job_id)
        next(watch)
        watch.close()
        assert client.status(job.job_id).state in (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING)
    finally:
        client.cancel(job.job_id)


def test_several_watchers_see_the_same_images(server: LiveServer, client: Client) -> None:
    job = client.submit(PROMPT, **SMALL, num_images=2)

    async def watch_twice() -> list[set[bytes]]:
        async def watch() -> set[bytes]:
            async with AsyncClient(server.address) as watcher:
                events = watcher.watch(job.job_id)
                return {event.image.sha256 async for event in events if isinstance(event, ImageFinished)}

        return list(await asyncio.gather(watch(), watch()))

    first, second = asyncio.run(watch_twice())
    assert first == second
    assert len(first) == 2


@pytest.mark.timeout(900)  # the first run builds the Go programs
def test_the_go_program_has_the_same_calls(
    server: LiveServer, client: Client, go_tools: GoTools, tmp_path: Path
) -> None:
    def jobs(*arguments: str, text: str = "") -> str:
        command = [str(go_tools.hidream_jobs), "-address", server.address, *arguments]
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    small = ("-width", "64", "-height", "64", "-steps", "3", "-seed", "11")
    job_id = jobs("submit", "-prompt", PROMPT, *small)
    told = jobs("watch", job_id)
    [image] = client.status(job_id).images
    assert told == f"image 0: {image.size_bytes} bytes"
    assert jobs("download", job_id, "0", str(tmp_path / "a.png")) == str(tmp_path / "a.png")
    assert hashlib.sha256((tmp_path / "a.png").read_bytes()).digest() == image.sha256
    assert '"JOB_STATE_SUCCEEDED"' in jobs("get", job_id)
    assert f"{job_id} SUCCEEDED" in jobs("list", "SUCCEEDED").splitlines()
    spec = f'"prompt": "{PROMPT}", "width": 64, "height": 64, "num_inference_steps": 150, "num_images": 4'
    [waiting, other] = jobs("batch", text=f'{{"spec": {{{spec}}}}}\n' * 2).split()
    for long_job in (waiting, other):
        assert jobs("cancel", long_job).startswith(long_job)
        wait_until(lambda job=long_job: has_ended(client, job), 30, "the job has ended")  # type: ignore[misc]
        jobs("delete", long_job)
        assert long_job not in jobs("list")


@pytest.mark.timeout(900)  # the first run builds the Go programs
def test_the_go_program_tells_every_change_of_every_job(
    server: LiveServer, client: Client, go_tools: GoTools
) -> None:
    command = [str(go_tools.hidream_jobs), "-address", server.address, "watch-all"]
    known = client.submit(PROMPT, **SMALL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            # It begins with the jobs that are there: from then on it misses nothing.
            lines = iter(process.stdout.readline, "")
            assert any(line.startswith(known.job_id) for line in lines)
            job_id = client.submit(PROMPT, **SMALL).job_id
            told = []
            for line in lines:
                told += [line.split()[1]] if line.startswith(job_id) else []
                if told[-1:] == ["SUCCEEDED"]:
                    break
        finally:
            process.kill()
    # A state that it has left before it could be told is passed over.
    assert told == [state for state in ("QUEUED", "RUNNING", "SUCCEEDED") if state in told]
