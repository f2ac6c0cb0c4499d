"""Calls whose server says that it will be there later, or says nothing."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.connection import DEFAULT_KEEPALIVE_SECONDS
from hidream.errors import DeadlineExceededError, ServerError, UnavailableError
from hidream.events import Progress, Succeeded
from hidream.reconnecting import MAX_RETRIES, ReconnectPolicy
from tests.clients.breaking_server import breaking_image_gen, serving
from tests.clients.conftest import GoTools, HealthOnlyServer
from tests.clients.test_hidream_command import HIDREAM
from tests.support.live_server import LiveServer

TOLD_SECONDS = 30.0


def test_a_call_that_the_server_wants_later_is_made_twice_more_as_the_same_request() -> None:
    servicer = breaking_image_gen()
    with serving(servicer) as address, Client(address) as client:
        servicer.num_busy = MAX_RETRIES
        client.submit("a")
        assert len(servicer.submitted) == 1 + MAX_RETRIES
        assert len(set(servicer.submitted)) == 1
        assert servicer.submitted[0]
        servicer.num_busy = MAX_RETRIES + 1
        with pytest.raises(UnavailableError, match="the model is loading"):
            client.submit("a")
        assert servicer.num_busy == 0


async def test_so_it_is_with_asyncio() -> None:
    servicer = breaking_image_gen()
    servicer.num_busy = MAX_RETRIES
    with serving(servicer) as address:
        async with AsyncClient(address) as client:
            await client.submit("a")
    assert len(servicer.submitted) == 1 + MAX_RETRIES


def test_no_retry_is_made_that_the_deadline_leaves_no_time_for() -> None:
    servicer = breaking_image_gen()
    servicer.num_busy = 1
    with (
        serving(servicer) as address,
        Client(address, timeout_seconds=0.0005) as client,
        pytest.raises(ServerError),
    ):
        client.submit("a")
    assert len(servicer.submitted) <= 1


async def test_a_call_without_a_deadline_has_that_of_its_client(health_only_server: HealthOnlyServer) -> None:
    # Its port is bound, and answers nothing before it starts.
    address = health_only_server.address
    with Client(address, timeout_seconds=0.1) as client, pytest.raises(DeadlineExceededError):
        await asyncio.to_thread(client.info)
    async with AsyncClient(address, timeout_seconds=0.1) as client, asyncio.timeout(60):
        with pytest.raises(DeadlineExceededError):
            await client.info()


@contextmanager
def stopped(server: LiveServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


class Follower:
    """Follows a job in a thread, and notes what it is told."""

    def __init__(self, follow: Callable[[ReconnectPolicy], object]) -> None:
        self.is_running = threading.Event()
        self.is_told = threading.Event()
        self.errors: list[ServerError] = []
        self.job_ids: set[str] = set()
        self.has_succeeded = False
        self._follow = follow
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        for event in self._follow(ReconnectPolicy(on_connection_lost=self._note)):  # type: ignore[attr-defined]
            self.job_ids.add(event.job_id)
            self.has_succeeded = isinstance(event, Succeeded)
            if isinstance(event, Progress):
                self.is_running.set()

    def _note(self, error: ServerError) -> None:
        self.errors.append(error)
        self.is_told.set()


@pytest.mark.parametrize(
    "keepalive_seconds", [1.0, pytest.param(DEFAULT_KEEPALIVE_SECONDS, marks=pytest.mark.long, id="default")]
)
def test_a_server_that_falls_silent_is_told_and_the_same_job_goes_on_when_it_wakes(
    keepalive_seconds: float, server: LiveServer
) -> None:
    with Client(server.address, keepalive_seconds=keepalive_seconds) as client:
        generation = Follower(
            lambda policy: client.generate(
                "a red circle", width=64, height=64, num_inference_steps=60, policy=policy
            )
        )
        assert generation.is_running.wait(60)
        [job_id] = generation.job_ids
        watch = Follower(lambda policy: client.watch(job_id, policy))
        assert watch.is_running.wait(60)
        with stopped(server):
            with pytest.raises(UnavailableError):
                client.info(timeout_seconds=TOLD_SECONDS)
            for follower in (generation, watch):
                assert follower.is_told.wait(TOLD_SECONDS)
                assert follower.errors[0].followed_job_id == job_id
        for follower in (generation, watch):
            follower.join()
            assert follower.has_succeeded
            assert follower.job_ids == {job_id}
        assert client.status(job_id).execution.attempt == 1


@pytest.mark.long
def test_a_stream_on_which_nothing_happens_is_kept(server: LiveServer) -> None:
    is_lost = threading.Event()
    policy = ReconnectPolicy(timeout_seconds=60.0, on_connection_lost=lambda _: is_lost.set())
    with Client(server.address) as client, pytest.raises(DeadlineExceededError):
        for _ in client.watch_all(states=["FAILED"], labels={"no": "job"}, policy=policy):
            pass
    assert not is_lost.is_set()


@pytest.mark.long
@pytest.mark.parametrize("program", ["hidream", "hidream-generate"])
def test_the_programs_tell_that_a_server_fell_silent_and_go_on_with_the_same_job(
    program: str, go_tools: GoTools, server: LiveServer, tmp_path: Path
) -> None:
    commands: dict[str, list[str | Path]] = {
        "hidream": [HIDREAM, "generate", "a red circle", "--size", "64x64"],
        "hidream-generate": [
            *(go_tools.hidream_generate, "-prompt", "a red circle", "-width", "64", "-height", "64")
        ],
    }
    arguments = [*commands[program], "--out", "a.png", "--steps", "150", "--address", server.address]
    num_accepted = server.info().jobs.total
    with subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=lambda: [*map(lines.put, process.stderr or ())])
        reader.start()

        def wait_for(text: str) -> str:
            while text not in (line := lines.get(timeout=TOLD_SECONDS)):
                pass
            return line

        wait_for("step 1 of 150")
        with stopped(server):
            told = wait_for("connection lost")
        assert re.search(r"request.id \w{26,32}", told)
        assert process.wait(120) == 0
        reader.join()
    assert (tmp_path / "a.png").exists()
    assert server.info().jobs.total == num_accepted + 1
