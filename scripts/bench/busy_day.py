"""What a busy day costs the event loop: many jobs that wait, many readers of all changes, some jobs that run.

The service runs as a process of its own (demo model, CPU, one rank of one thread) with a probe in its event
loop. The jobs that run are the demo model's, in a rank of the lowest priority: its steps and snapshots are
real, and it takes only what the server leaves it. The readers are a process of their own. Measured in this
order: submits to an empty queue, without a pause and then now and then; the server at rest, with the queue
empty and full; submits to the full queue with all readers, now and then, and then without a pause. The ratio
is of submits now and then: after a pause everything takes longer, whatever waits. Prints one JSON line. CPU
times are those of the server's process alone, whatever else the machine does.

    python -m scripts.bench.busy_day [--waiting 5000] [--watchers 200] [--running 16] [--submits 100]
        [--store postgresql+asyncpg://…]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import grpc
import grpc.aio
import psutil
import typer

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from scripts.bench.images import PROMPT, serving
from scripts.bench.report import percentile, report, say

WATCHED = {"bench": "watched"}
NUM_CHANNELS = 8
BATCH_JOBS = 100
LOWEST_PRIORITY = 19
NOW_AND_THEN_SECONDS = 0.25


class ProbedService:
    """A service with a probe in its event loop.

    Attributes:
        address: where it listens.
    """

    def __init__(self, pid: int, address: str, figures: Path) -> None:
        self.address = address
        self._process = psutil.Process(pid)
        self._figures = figures
        self._num_reports = 0

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the server's process, all its threads included and its ranks not."""
        return float(sum(self._process.cpu_times()[:2]))

    def lower_ranks(self) -> None:
        """Give the processes of the engine only what the server leaves."""
        for process in self._process.children(recursive=True):
            process.nice(LOWEST_PRIORITY)

    def start_probe(self) -> None:
        """Measure from now on; what the probe itself takes is not to be counted at rest."""
        self._process.send_signal(signal.SIGUSR1)

    def loop_figures(self) -> dict[str, float]:
        """What the probe has measured since it was started, in milliseconds; it stops."""
        self._process.send_signal(signal.SIGUSR2)
        self._num_reports += 1
        while True:
            lines = self._figures.read_text().splitlines() if self._figures.exists() else []
            if len(lines) == self._num_reports:
                return dict(json.loads(lines[-1]))
            time.sleep(0.01)

    def cores_at_rest(self, seconds: float) -> float:
        """How much of a core it takes while nobody asks it for anything."""
        start, used = time.monotonic(), self.cpu_seconds
        time.sleep(seconds)
        return (self.cpu_seconds - used) / (time.monotonic() - start)


@contextmanager
def probed_service(store: str | None, waiting: int, watchers: int, running: int) -> Iterator[ProbedService]:
    """The service, with room for so many jobs and readers."""
    with TemporaryDirectory(prefix="hidream-bench-") as folder:
        figures = Path(folder) / "loop.jsonl"
        command = [sys.executable, "-m", "scripts.bench.probed_server", str(figures), "serve"]
        where = ["--listen", "127.0.0.1:0", "--data-dir", folder, *(["--store", store] if store else [])]
        model = ["--model-path", str(demo_checkpoint_path())]
        ranks = ["--device-type", "cpu", "--devices", "0", "--threads-per-rank", "1"]
        limits = ["--max-queued-jobs", str(waiting + 10_000), "--max-running-jobs", str(running)]
        streams = ["--max-streams", str(watchers + 10), "--max-streams-per-caller", str(watchers + 10)]
        words = [*command, *where, *model, *ranks, *limits, *streams]
        with serving(words) as (process, address):
            try:
                yield ProbedService(process.pid, address, figures)
            finally:
                # The second signal, which follows, ends the grace of the jobs that run.
                process.send_signal(signal.SIGTERM)
                time.sleep(0.5)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that was accepted.

    Attributes:
        seconds: that the call took.
        end: when it was answered, by the clock that all processes of the machine share.
    """

    job_id: str
    seconds: float
    end: float


class Caller:
    """One caller's calls, one after another."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stub = image_gen_pb2_grpc.ImageGenStub(channel)

    def run(self, num_jobs: int) -> None:
        """Have so many jobs run, which go on for longer than the bench."""
        # All of them fit the least budget of a step: of larger ones fewer would run at the same time.
        self.submit_all(num_jobs, width=256, height=256, num_inference_steps=150)
        running = image_gen_pb2.ListJobsRequest(states=[job_pb2.JOB_STATE_RUNNING])
        while len(self._stub.ListJobs(running).jobs) < num_jobs:
            time.sleep(0.1)

    def submit_all(self, num_jobs: int, **spec: Any) -> None:
        """Submit many in batches."""
        for start in range(0, num_jobs, BATCH_JOBS):
            numbers = range(start, min(num_jobs, start + BATCH_JOBS))
            requests = [_request(number, **spec) for number in numbers]
            self._stub.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=requests))

    def submit(self, num_jobs: int, pause_seconds: float = 0.0) -> list[Submitted]:
        """Submit watched jobs, one after another."""
        submitted = []
        for number in range(num_jobs):
            start = time.monotonic()
            message = _request(number)
            message.labels.update(WATCHED)
            job = self._stub.SubmitJob(message)
            end = time.monotonic()
            submitted.append(Submitted(job.job_id, end - start, end))
            time.sleep(pause_seconds)
        return submitted

    def remove(self, submitted: list[Submitted]) -> None:
        """Cancel jobs that wait, and delete them."""
        for job in submitted:
            self._stub.CancelJob(image_gen_pb2.CancelJobRequest(job_id=job.job_id))
            self._stub.DeleteJob(image_gen_pb2.DeleteJobRequest(job_id=job.job_id))


def _request(number: int, **spec: Any) -> image_gen_pb2.SubmitJobRequest:
    return image_gen_pb2.SubmitJobRequest(
        spec=image_pb2.ImageSpec(prompt=f"{PROMPT}, number {number}", **spec),
    )


class Watchers:
    """Readers of changes, in a process of their own."""

    def __init__(self, address: str, num_readers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._answers, theirs = context.Pipe()
        self._process = context.Process(target=_watch, args=(address, num_readers, theirs), daemon=True)
        self._process.start()
        self._answers.recv()

    def heard_times(self, num_changes: int) -> list[float]:
        """When the last of all readers heard of each of so many first changes; waits until they have."""
        self._answers.send(num_changes)
        return list(self._answers.recv())

    def close(self) -> None:
        """End them."""
        self._answers.send(None)
        self._process.join()


def _watch(address: str, num_readers: int, asked: Connection) -> None:
    asyncio.run(_watch_until_told(address, num_readers, asked))


async def _watch_until_told(address: str, num_readers: int, asked: Connection) -> None:
    last_heard: list[float] = []
    num_heard: list[int] = []
    has_news = asyncio.Event()

    async def read(stream: Any) -> None:
        index = 0
        async for _ in stream:
            if index == len(num_heard):
                num_heard.append(0)
                last_heard.append(0.0)
            num_heard[index] += 1
            last_heard[index] = time.monotonic()
            index += 1
            has_news.set()

    async def until_heard(num_changes: int) -> list[float]:
        while len(num_heard) < num_changes or num_heard[num_changes - 1] < num_readers:
            has_news.clear()
            await has_news.wait()
        return last_heard[:num_changes]

    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                # Channels of the same options would share one connection.
                grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(NUM_CHANNELS)
        ]
        request = image_gen_pb2.WatchJobsRequest(labels=WATCHED).SerializeToString()
        tasks = []
        for number in range(num_readers):
            # Bytes, not messages: what parsing takes is not to be taken from the server.
            method: Any = channels[number % NUM_CHANNELS].unary_stream("/hidream.v1.ImageGen/WatchJobs")
            tasks.append(asyncio.create_task(read(method(request))))
        await until_heard(1)
        asked.send(None)
        while (num_changes := await asyncio.to_thread(asked.recv)) is not None:
            asked.send(await until_heard(num_changes))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main(
    waiting: Annotated[int, typer.Option(help="jobs that wait")] = 5000,
    watchers: Annotated[int, typer.Option(help="readers of all changes")] = 200,
    running: Annotated[int, typer.Option(help="jobs that run")] = 16,
    submits: Annotated[int, typer.Option(help="jobs that are submitted in turn")] = 100,
    rest_seconds: Annotated[float, typer.Option(help="for which the server is left alone")] = 10.0,
    store: Annotated[str | None, typer.Option(help="PostgreSQL's URL; SQLite without")] = None,
) -> None:
    """Measure a day in a minute."""
    with (
        probed_service(store, waiting, watchers, running) as service,
        grpc.insecure_channel(service.address) as channel,
    ):
        caller = Caller(channel)
        caller.run(running)
        # Before, they would not start beside much other work.
        service.lower_ranks()
        caller.remove(caller.submit(submits))
        empty_burst = caller.submit(submits)
        caller.remove(empty_burst)
        empty = caller.submit(submits, NOW_AND_THEN_SECONDS)
        caller.remove(empty)
        cores_with_empty_queue = service.cores_at_rest(rest_seconds)
        say(f"submit to an empty queue: {_milliseconds(empty, 50)} ms; fills the queue")
        caller.submit_all(waiting)
        cores_at_rest = service.cores_at_rest(rest_seconds)
        service.start_probe()
        time.sleep(rest_seconds)
        rest = service.loop_figures()
        say(f"at rest: {cores_at_rest:.3f} of a core, empty {cores_with_empty_queue:.3f}; {rest}")
        caller.submit(1)
        readers = Watchers(service.address, watchers)
        service.start_probe()
        used = service.cpu_seconds
        paced = caller.submit(submits, NOW_AND_THEN_SECONDS)
        heard = readers.heard_times(1 + submits)[1:]
        paced_cpu_seconds = service.cpu_seconds - used
        paced_loop = service.loop_figures()
        say(f"now and then: submit {_milliseconds(paced, 50)} ms; {paced_loop}")
        service.start_probe()
        used, start = service.cpu_seconds, time.monotonic()
        burst = caller.submit(submits)
        burst_heard = readers.heard_times(1 + 2 * submits)[1 + submits :]
        burst_cpu_seconds = service.cpu_seconds - used
        burst_loop = service.loop_figures()
        readers.close()
    report(
        "busy_day",
        store="PostgreSQL" if store else "SQLite",
        ratio=round(_milliseconds(paced, 99) / _milliseconds(empty, 99), 2),
        empty_queue_submit_ms={"p50": _milliseconds(empty, 50), "p99": _milliseconds(empty, 99)},
        empty_queue_burst_submit_ms={
            "p50": _milliseconds(empty_burst, 50),
            "p99": _milliseconds(empty_burst, 99),
        },
        submit_ms={"p50": _milliseconds(paced, 50), "p99": _milliseconds(paced, 99)},
        burst_submit_ms={"p50": _milliseconds(burst, 50), "p99": _milliseconds(burst, 99)},
        cores_at_rest=round(cores_at_rest, 3),
        cores_at_rest_with_empty_queue=round(cores_with_empty_queue, 3),
        rest_loop=dict(rest),
        loop=dict(paced_loop),
        burst_loop=dict(burst_loop),
        heard_seconds_p99=round(percentile(_delays(paced, heard), 99), 3),
        heard_seconds_max=round(max(_delays(paced, heard)), 3),
        cpu_ms_a_submit=round(1e3 * paced_cpu_seconds / submits, 1),
        burst_submitted_seconds=round(burst[-1].end - start, 2),
        burst_heard_seconds=round(max(burst_heard) - start, 2),
        burst_cpu_seconds=round(burst_cpu_seconds, 2),
        waiting_jobs=waiting,
        watchers=watchers,
        running_jobs=running,
        submits=submits,
    )


def _milliseconds(submitted: list[Submitted], percent: int) -> float:
    return round(1e3 * percentile([job.seconds for job in submitted], percent), 1)


def _delays(submitted: list[Submitted], heard: list[float]) -> list[float]:
    """Seconds from the answer to a submit until all readers had heard of the job."""
    return [max(0.0, time_heard - job.end) for job, time_heard in zip(submitted, heard, strict=True)]


if __name__ == "__main__":
    typer.run(main)
