"""Kills the whole service again and again while jobs are submitted, and counts what became of them.

python -m tests.failure.kill_loop --kills 25 --seed 1 --store postgresql
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import typer

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc, image_pb2, job_pb2
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.postgres import running_postgres

END_SECONDS = 240.0
MAX_SECONDS_TO_KILL = 6.0
LONG_STEPS = 100
ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


def job_request(
    request_id: str, seed: int, num_inference_steps: int, side: int = 64
) -> image_gen_pb2.SubmitJobRequest:
    spec = image_pb2.ImageSpec(
        prompt="a red circle on a blue background",
        width=side,
        height=side,
        seed=seed,
        num_inference_steps=num_inference_steps,
    )
    return image_gen_pb2.SubmitJobRequest(spec=spec, request_id=request_id)


def downloaded(stub: image_gen_pb2_grpc.ImageGenStub, job_id: str, index: int = 0, offset: int = 0) -> bytes:
    """An image, from an offset on."""
    request = image_gen_pb2.DownloadImageRequest(job_id=job_id, image_index=index, offset=offset)
    data = b""
    for response in stub.DownloadImage(request):
        assert response.chunk.offset == offset + len(data)
        data += response.chunk.data
    return data


@dataclass
class Counts:
    """What happened, and what became of the jobs."""

    kills: int = 0
    acknowledged: int = 0
    restarted: int = 0
    resumed_steps: list[int] = field(default_factory=list)
    states: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    drawn_twice: int = 0
    wrong_bytes: int = 0
    sequences_that_fell: int = 0


class Watcher:
    """Follows one job over all deaths of its server, as a client does: from the last sequence on."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        self.events: list[job_pb2.JobEvent] = []

    def watch(self, server: LiveServer) -> None:
        """Read until the job has ended or the server is gone."""
        after_sequence = self.events[-1].sequence if self.events else 0
        request = image_gen_pb2.WatchJobRequest(job_id=self.job_id, after_sequence=after_sequence)
        with server.stub() as stub, contextlib.suppress(grpc.RpcError):
            for response in stub.WatchJob(request):
                self.events.append(response.event)

    @property
    def has_ended(self) -> bool:
        return bool(self.events) and self.events[-1].WhichOneof("event") in ("succeeded", "failed")

    def image(self) -> bytes:
        """Put together from the chunks, which must follow one another."""
        data = b""
        for event in self.events:
            if event.HasField("image_chunk"):
                assert event.image_chunk.offset == len(data)
                data += event.image_chunk.data
        return data


class KillLoop:
    """One run of the loop; what is drawn, and when the server dies, comes from the seed."""

    def __init__(
        self,
        seed: int,
        num_kills: int,
        flags: tuple[str, ...],
        long_steps: int = LONG_STEPS,
        max_seconds_to_kill: float = MAX_SECONDS_TO_KILL,
    ) -> None:
        self._random = random.Random(seed)
        self._num_kills = num_kills
        self._flags = flags
        self._long_steps = long_steps
        self._max_seconds_to_kill = max_seconds_to_kill
        self._acknowledged: dict[str, str] = {}
        self._requests: dict[str, image_gen_pb2.SubmitJobRequest] = {}
        self.counts = Counts()

    def run(self) -> Watcher:
        """Kill, start again, and count; returns who followed the long job."""
        watcher: Watcher | None = None
        for number in range(self._num_kills):
            with running_server(*self._flags) as server:
                if watcher is None:
                    watcher = Watcher(self._submit_long(server))
                self._submit_until_killed(server, watcher, number)
        assert watcher is not None
        with running_server(*self._flags) as server:
            self._await_all(server)
            watcher.watch(server)
            self._check(server, watcher)
        return watcher

    def _submit_long(self, server: LiveServer) -> str:
        request = job_request("long", 1, self._long_steps, side=128)
        with server.stub() as stub:
            job_id = stub.SubmitJob(request).job_id
        self._note(request, job_id)
        return job_id

    def _note(self, request: image_gen_pb2.SubmitJobRequest, job_id: str) -> None:
        self._requests[request.request_id] = request
        self._acknowledged[request.request_id] = job_id
        self.counts.acknowledged += 1

    def _submit_until_killed(self, server: LiveServer, watcher: Watcher, number: int) -> None:
        killer = threading.Timer(self._random.uniform(0.3, self._max_seconds_to_kill), server.process.kill)
        reader = threading.Thread(target=watcher.watch, args=(server,))
        killer.start()
        reader.start()
        try:
            self._submit(server, number)
        finally:
            reader.join()
            killer.join()
            server.process.wait()
            self.counts.kills += 1

    def _submit(self, server: LiveServer, number: int) -> None:
        with server.stub() as stub, contextlib.suppress(grpc.RpcError):
            for count in range(self._random.randint(2, 8)):
                requests = [
                    job_request(
                        f"{number}-{count}-{part}", self._random.randrange(1000), self._random.randint(1, 4)
                    )
                    for part in range(self._random.choice((1, 1, 3)))
                ]
                jobs = stub.BatchSubmitJobs(image_gen_pb2.BatchSubmitJobsRequest(requests=requests)).jobs
                for request, job in zip(requests, jobs, strict=True):
                    self._note(request, job.job_id)

    def _await_all(self, server: LiveServer) -> None:
        def have_ended() -> bool:
            jobs = server.info().jobs
            return jobs.queued == jobs.running == 0

        wait_until(have_ended, END_SECONDS, "all jobs have ended")

    def _check(self, server: LiveServer, watcher: Watcher) -> None:
        counts = self.counts
        states: Counter[str] = Counter()
        with server.stub() as stub:
            for request_id, job_id in self._acknowledged.items():
                try:
                    job = stub.GetJob(image_gen_pb2.GetJobRequest(job_id=job_id))
                except grpc.RpcError:
                    counts.lost += 1
                    continue
                states[job_pb2.JobState.Name(job.state)] += 1
                counts.restarted += job.execution.attempt > 1
                if job.state == job_pb2.JOB_STATE_SUCCEEDED:
                    is_right = all(
                        hashlib.sha256(downloaded(stub, job_id, image.index)).digest() == image.sha256
                        for image in job.images
                    )
                    counts.wrong_bytes += not is_right
                counts.drawn_twice += stub.SubmitJob(self._requests[request_id]).job_id != job_id
        counts.states = dict(states)
        sequences = [event.sequence for event in watcher.events]
        counts.sequences_that_fell = sum(after <= before for before, after in itertools.pairwise(sequences))
        counts.resumed_steps = [
            event.restarted.resumed_from_step for event in watcher.events if event.HasField("restarted")
        ]


@contextlib.contextmanager
def flags_of(store: str, directory: Path) -> Iterator[tuple[str, ...]]:
    """Flags of a server whose jobs outlive it in a SQLite file or a PostgreSQL database."""
    one_rank = ("--devices", "1", "--threads-per-rank", "1")
    common = ("--data-dir", str(directory), *one_rank, "--max-queued-jobs", "1000")
    if store == "sqlite":
        yield common
    else:
        with running_postgres() as postgres, postgres.database() as url:
            yield (*common, "--store", url, "--lease-seconds", "1")


def main(
    kills: Annotated[int, typer.Option(help="how often the service is killed")] = 25,
    seed: Annotated[int, typer.Option(help="of what is drawn, and when the service is killed")] = 1,
    store: Annotated[str, typer.Option(help="sqlite or postgresql")] = "sqlite",
) -> None:
    """Run the loop, print what came of it."""
    with tempfile.TemporaryDirectory() as directory, flags_of(store, Path(directory)) as flags:
        loop = KillLoop(seed, kills, flags)
        loop.run()
        typer.echo(json.dumps({"store": store, "seed": seed, **asdict(loop.counts)}))


if __name__ == "__main__":
    typer.run(main)
