"""Callers who do everything at once, and leave at any moment, at two replicas."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from hidream.v1 import image_gen_pb2
from tests.support.job_calls import (
    WAIT_SECONDS,
    Stub,
    cancel,
    delete,
    downloaded,
    get,
    listed,
    submission,
    submit,
    submit_batch,
    watch,
)
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.postgres import running_postgres
from tests.support.streams import request

NUM_CALLERS = 8
NUM_CALLS = 60
"""Calls that each caller makes."""
SEED = 6
ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Caller:
    """One that calls again and again, what its random numbers say."""

    def __init__(self, seed: int, num_calls: int, job_ids: list[str]) -> None:
        self._random = random.Random(seed)
        self._num_calls = num_calls
        self._job_ids = job_ids
        self.codes: Counter[tuple[str, grpc.StatusCode]] = Counter()

    def run(self, servers: tuple[LiveServer, LiveServer]) -> None:
        calls: list[Callable[[Stub], None]] = [
            self.draw,
            self.leave,
            self.draw_in_time,
            self.submit,
            self.vanish,
            self.look,
            self.cancel,
            self.delete,
            self.list,
            self.download,
        ]
        with servers[0].stub() as one, servers[1].stub() as other:
            for _ in range(self._num_calls):
                call, code = self._random.choice(calls), grpc.StatusCode.OK
                try:
                    call(self._random.choice((one, other)))
                except grpc.RpcError as error:
                    assert isinstance(error, grpc.Call)
                    code = error.code()
                self.codes[call.__name__, code] += 1

    def draw(self, stub: Stub) -> None:
        list(stub.Generate(request(num_inference_steps=self._random.randint(1, 6))))

    def leave(self, stub: Stub) -> None:
        call = stub.Generate(request(num_inference_steps=60))
        if self._random.random() < 0.5:
            next(call)
        else:
            time.sleep(self._random.uniform(0.0, 0.02))
        call.cancel()

    def draw_in_time(self, stub: Stub) -> None:
        list(stub.Generate(request(num_inference_steps=20), timeout=self._random.uniform(0.005, 0.3)))

    def submit(self, stub: Stub) -> None:
        if self._random.random() < 0.5:
            self._job_ids.append(submit(stub).job_id)
        else:
            jobs = submit_batch(stub, *(submission(num_inference_steps=1) for _ in range(3)))
            self._job_ids.extend(job.job_id for job in jobs)

    def vanish(self, stub: Stub) -> None:
        call: Any = stub.SubmitJob.future(submission())  # type: ignore[attr-defined]
        time.sleep(self._random.uniform(0.0, 0.015))
        call.cancel()

    def look(self, stub: Stub) -> None:
        call = watch(stub, self._some_job())
        next(call, None)
        call.cancel()

    def cancel(self, stub: Stub) -> None:
        cancel(stub, self._some_job())

    def delete(self, stub: Stub) -> None:
        delete(stub, self._some_job())

    def list(self, stub: Stub) -> None:
        listed(stub, page_size=20)

    def download(self, stub: Stub) -> None:
        job_id = self._some_job()
        data = downloaded(stub, job_id)
        assert hashlib.sha256(data).digest() == get(stub, job_id).images[0].sha256

    def _some_job(self) -> str:
        return self._random.choice(self._job_ids[-50:] or ["none yet"])


@pytest.mark.long
def test_each_job_that_was_accepted_ends_once_whatever_its_callers_do(tmp_path: Path) -> None:
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres())
        flags = {
            "--store": stack.enter_context(postgres.database()),
            "--artifacts": (tmp_path / "artifacts").as_uri(),
            "--devices": 1,
            "--threads-per-rank": 1,
            "--max-running-jobs": 3,
            "--max-queued-jobs": 50,
            "--lease-seconds": 10,
        }
        words = [str(word) for flag in flags.items() for word in flag]
        servers = (stack.enter_context(running_server(*words)), stack.enter_context(running_server(*words)))
        job_ids: list[str] = []
        callers = [Caller(SEED + number, NUM_CALLS, job_ids) for number in range(NUM_CALLERS)]
        with ThreadPoolExecutor(NUM_CALLERS) as threads:
            list(threads.map(lambda caller: caller.run(servers), callers))
        codes = sum((caller.codes for caller in callers), Counter())
        assert {code for _, code in codes} <= ANSWERS, codes
        assert codes["draw", grpc.StatusCode.OK] > 0

        def counts() -> tuple[int, int]:
            """Count the jobs that both accepted, and those that they ended."""
            infos = [server.info().jobs for server in servers]
            ended = sum(jobs.succeeded + jobs.failed + jobs.cancelled for jobs in infos)
            return sum(jobs.total for jobs in infos), ended

        wait_until(lambda: len(set(counts())) == 1, WAIT_SECONDS, "each job has ended, and once")
        for server in servers:
            server.wait_until_idle()
            assert server.info().jobs.failed == 0
            troubles = [line for line in server.log_lines if " WARNING " in line or " ERROR " in line]
            assert troubles == []
        accepted, ended = counts()
        assert accepted == ended
        with servers[0].stub() as stub:
            kept = stub.ListJobs(image_gen_pb2.ListJobsRequest(page_size=1000)).jobs
        assert all(job.HasField("end_time") for job in kept)
