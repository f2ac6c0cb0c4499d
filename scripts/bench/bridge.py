"""What the HTTP bridge costs over gRPC.

The bridge runs as a process of its own before a running service (demo model, CPU, two ranks of one thread).
Requests in turn over gRPC and over HTTP: the time from the request to its first progress, the median of the
ratios over pairs. Then how often a second a job is asked for over each, and what idle readers of events take.
Prints one JSON line.

    python -m scripts.bench.bridge [--rounds 9] [--requests 1000] [--readers 200]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated

import httpx
import psutil
import typer

from hidream.aio import AsyncClient
from hidream.events import Progress
from scripts.bench.images import PROMPT, ImageRequest, running_service
from scripts.bench.report import report

REQUEST = ImageRequest(side_pixels=64, num_inference_steps=2)
NUM_CONNECTIONS = 8
EVENT_STREAM = {"Accept": "text/event-stream"}
WATCH = b"GET /v1/jobs:watch HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n\r\n"


@contextmanager
def running_bridge(server: str) -> Iterator[tuple[psutil.Process, int]]:
    """A bridge, and the port that it listens on."""
    command = [sys.executable, "-m", "hidream_http", "--server", server, "--listen", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--log-level", "WARNING"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        try:
            yield psutil.Process(process.pid), port
        finally:
            process.terminate()


async def first_progress_over_grpc(client: AsyncClient, seed: int) -> float:
    """Seconds until the first progress of an image, which is then waited for: the next request is alone."""
    seconds = 0.0
    start = time.perf_counter()
    async for event in client.generate(PROMPT, **REQUEST.options(seed)):
        if isinstance(event, Progress) and not seconds:
            seconds = time.perf_counter() - start
    return seconds


async def first_progress_over_http(client: httpx.AsyncClient, seed: int) -> float:
    """Seconds until the bytes of the first progress of an image, which is then waited for."""
    seconds = 0.0
    body = {"spec": {"prompt": PROMPT, **REQUEST.options(seed)}}
    start = time.perf_counter()
    async with client.stream("POST", "/v1/generate", json=body, headers=EVENT_STREAM) as answer:
        async for line in answer.aiter_lines():
            if not seconds and line.startswith("data: ") and "progress" in json.loads(line[6:])["event"]:
                seconds = time.perf_counter() - start
    return seconds


async def requests_per_second(port: int, path: str, num_requests: int) -> float:
    """How often a second a path is answered, over a few connections that stay open."""
    request = f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()

    async def ask(times: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(times):
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), head
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(ask(num_requests // NUM_CONNECTIONS) for _ in range(NUM_CONNECTIONS)))
    return num_requests / (time.perf_counter() - start)


async def calls_per_second(client: AsyncClient, job_id: str, num_calls: int) -> float:
    """The same over gRPC."""

    async def ask(times: int) -> None:
        for _ in range(times):
            await client.status(job_id)

    start = time.perf_counter()
    await asyncio.gather(*(ask(num_calls // NUM_CONNECTIONS) for _ in range(NUM_CONNECTIONS)))
    return num_calls / (time.perf_counter() - start)


@asynccontextmanager
async def idle_readers(port: int, num_readers: int) -> AsyncIterator[None]:
    """Readers of events who hear nothing."""
    writers = []
    for _ in range(num_readers):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(WATCH)
        await reader.readuntil(b"\r\n\r\n")
        writers.append(writer)
    yield
    for writer in writers:
        writer.close()


async def measure(
    server: str, process: psutil.Process, port: int, rounds: int, requests: int, readers: int
) -> None:
    """Measure all, and print it."""
    url = f"http://127.0.0.1:{port}"
    async with (
        AsyncClient(server) as grpc,
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http,
    ):
        await first_progress_over_grpc(grpc, 0)
        await first_progress_over_http(http, 0)
        pairs = [
            (await first_progress_over_grpc(grpc, seed), await first_progress_over_http(http, seed))
            for seed in range(1, rounds + 1)
        ]
        job = await grpc.submit(PROMPT, **REQUEST.options(1))
        await grpc.wait(job)
        over_grpc = await calls_per_second(grpc, job.job_id, requests)
        used = process.cpu_times()
        over_http = await requests_per_second(port, f"/v1/jobs/{job.job_id}", requests)
        cpu_seconds = sum(process.cpu_times()[:2]) - sum(used[:2])
        as_replaced = await requests_per_second(port, f"/status/{job.job_id}", requests)
        async with idle_readers(port, 5):
            before = process.memory_info().rss
            async with idle_readers(port, readers):
                reader_bytes = process.memory_info().rss - before
    report(
        "bridge_cost",
        ratio=round(statistics.median(http / grpc for grpc, http in pairs), 3),
        grpc_seconds=round(statistics.median(pair[0] for pair in pairs), 4),
        http_seconds=round(statistics.median(pair[1] for pair in pairs), 4),
        grpc_calls_per_second=round(over_grpc),
        http_requests_per_second=round(over_http),
        bridge_cpu_milliseconds_a_request=round(1e3 * cpu_seconds / requests, 2),
        status_requests_per_second=round(as_replaced),
        idle_reader_megabytes=round(reader_bytes / 1e6, 1),
        rounds=rounds,
        readers=readers,
    )


def main(
    rounds: Annotated[int, typer.Option(help="pairs of requests")] = 9,
    requests: Annotated[int, typer.Option(help="how often a job is asked for")] = 1000,
    readers: Annotated[int, typer.Option(help="idle readers of events")] = 200,
) -> None:
    """Measure the bridge before a service of its own."""
    with running_service() as server, running_bridge(server) as (process, port):
        asyncio.run(measure(server, process, port, rounds, requests, readers))


if __name__ == "__main__":
    typer.run(main)
