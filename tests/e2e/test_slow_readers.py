"""Readers that stop reading cost little, give it back, and hold nobody up."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc
from hidream_grpc.settings import Settings
from tests.support.live_server import LiveServer, wait_until
from tests.support.streams import follow, grow_to, request

REPOSITORY = Path(__file__).parents[2]
NUM_READERS = 200
NUM_PROCESSES = 2
MAX_BYTES_A_READER = 1024 * 1024
# The allocator keeps some of what it got for the next time: measured 24 to 36 MB of 120, 10 MB more or less
# from one round to another.
KEPT_SHARE = 0.4
ALLOCATOR_SLACK_BYTES = 24 * 1024 * 1024
TIMEOUT_SECONDS = 60


@contextmanager
def stalled_readers(
    server: LiveServer, message: image_gen_pb2.GenerateRequest, num_chunks: int
) -> Iterator[None]:
    """Hold readers that have read so many image chunks and read no more; they leave at the end."""
    search_path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tests.support.stalled_readers", server.address]
    processes = [
        subprocess.Popen(
            [*command, str(NUM_READERS // NUM_PROCESSES), str(num_chunks)],
            env={**os.environ, "PYTHONPATH": search_path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(NUM_PROCESSES)
    ]
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(base64.b64encode(message.SerializeToString()).decode() + "\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "stalled\n"
        yield
    finally:
        for process in processes:
            try:
                process.communicate(timeout=TIMEOUT_SECONDS)
            finally:
                process.kill()
                process.wait()
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES


def ended_calls(server: LiveServer, job_id: str) -> Counter[str]:
    """Calls of `Generate` for this job that have ended, by code, from the access log."""
    return Counter(re.findall(rf"hidream_grpc\.access: Generate (\w+) .*job_id={job_id}", server.log))


def has_ended_calls(server: LiveServer, job_id: str, num_calls: int) -> bool:
    return ended_calls(server, job_id).total() == num_calls


def rss_bytes(server: LiveServer) -> int:
    """Memory of the server process alone; its ranks are processes of their own."""
    return int(psutil.Process(server.pid).memory_info().rss)


def detached_job(request_id: str, *, num_images: int, steps: int, side: int) -> image_gen_pb2.GenerateRequest:
    return request(
        width=side,
        height=side,
        num_images=num_images,
        num_inference_steps=steps,
        guidance_scale=1.0,
        detached=True,
        request_id=request_id,
    )


@pytest.mark.long
@pytest.mark.parametrize("num_rounds", [2, 5])
def test_two_hundred_stalled_readers_cost_at_most_a_megabyte_each_and_give_it_back(
    num_rounds: int, server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    message = detached_job(f"stalled-1-{num_rounds}", num_images=2, steps=1, side=1024)
    stream = follow(stub.Generate(message))
    images, job_id = stream.images, stream.job.job_id
    # So that nobody has room for what it does not read: gRPC's window is 64 KiB at first.
    assert all(len(image) > 4 * Settings.model_fields["chunk_bytes"].default for image in images)
    before = rss_bytes(server)
    held: list[int] = []
    kept: list[int] = []

    def has_given_back() -> bool:
        now = rss_bytes(server)
        may_keep = max(ALLOCATOR_SLACK_BYTES, KEPT_SHARE * (held[-1] - before))
        # No more than after the first round, too: what each round keeps would be a leak.
        return now - before <= may_keep and now - [*kept, now][0] <= ALLOCATOR_SLACK_BYTES

    for num_left in range(NUM_READERS, (num_rounds + 1) * NUM_READERS, NUM_READERS):
        with stalled_readers(server, message, num_chunks=1):
            # Another caller's job takes its course, and is told to its end, while they stall.
            beside = follow(stub.Generate(request(num_inference_steps=5)))
            held.append(rss_bytes(server))
        assert grow_to(beside.steps, 5)
        has_lost_all = partial(has_ended_calls, server, job_id, 1 + num_left)
        wait_until(has_lost_all, TIMEOUT_SECONDS, "every call has ended")
        assert ended_calls(server, job_id) == {"OK": 1, "CANCELLED": num_left}, "each was being served"
        what = f"the server has given back what {held} held over {before}, and keeps {kept}"
        wait_until(has_given_back, TIMEOUT_SECONDS, what)
        kept.append(rss_bytes(server))
    assert "ExecuteBatchError" not in server.log, "that callers leave is no news but for the access log"
    told = f"before {before}, held {held}, kept {kept}"
    assert max(held) - before <= NUM_READERS * MAX_BYTES_A_READER, told
    assert held[-1] - held[0] <= ALLOCATOR_SLACK_BYTES, told
    assert kept[-1] - kept[0] <= ALLOCATOR_SLACK_BYTES, told


def test_a_reader_that_stalls_misses_nothing_when_it_reads_on(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    message = detached_job("stalled-2", num_images=1, steps=1, side=512)
    slow = stub.Generate(message)
    assert next(slow).event.HasField("queued")
    whole = follow(stub.Generate(message))
    rest = follow(slow)
    assert rest.images == whole.images
    assert rest.kinds[-1] == "succeeded"
    sequences = [event.sequence for event in rest.events]
    assert sequences == sorted(set(sequences))


def test_a_caller_who_tries_again_keeps_the_job_that_its_lost_call_had(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    message = request(num_inference_steps=8, request_id="retried")
    lost = stub.Generate(message)
    job_id = next(lost).job_id
    retry = stub.Generate(message)
    first = next(retry)
    lost.cancel()
    stream = follow(retry)
    assert first.job_id == stream.responses[-1].job_id == job_id
    assert stream.kinds[-1] == "succeeded"


def test_two_hundred_readers_that_stall_before_the_first_step_do_not_hold_up_their_job(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    message = detached_job("stalled-3", num_images=1, steps=6, side=128)
    message.preview = True
    with stalled_readers(server, message, num_chunks=0):
        stream = follow(stub.Generate(message))
    assert stream.of_kind("progress")[-1].progress.step == 6
    assert stream.job.execution.attempt == 1
