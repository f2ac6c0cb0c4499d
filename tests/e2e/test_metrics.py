"""What Prometheus reads, and that it moves with what happens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.prometheus_samples import scrape
from tests.support.streams import follow, request

TIMEOUT_SECONDS = 60


def test_calls_and_their_seconds_are_counted_by_method_and_code(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    server.wait_until_idle()
    before = scrape(server)
    follow(stub.Generate(request(num_inference_steps=2)))
    stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest())
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            follow(stub.Generate(request("")))
    with pytest.raises(grpc.RpcError):
        stub.GetJob(image_gen_pb2.GetJobRequest(job_id="j"))
    running = stub.Generate(request(num_inference_steps=150, width=256, height=256))
    next(running)
    running.cancel()
    expected = {
        ("Generate", "OK"): 1,
        ("GetServerInfo", "OK"): 1,
        ("Generate", "INVALID_ARGUMENT"): 3,
        ("GetJob", "NOT_FOUND"): 1,
        ("Generate", "CANCELLED"): 1,
    }

    def moved(name: str) -> dict[tuple[str, str], float]:
        after = scrape(server)
        return {
            (method, code): after.value(name, method=method, code=code)
            - before.value(name, method=method, code=code)
            for method, code in expected
        }

    wait_until(lambda: moved("hidream_calls_total") == expected, TIMEOUT_SECONDS, f"calls are {expected}")
    assert moved("hidream_call_seconds_count") == expected
    assert all(seconds > 0 for seconds in moved("hidream_call_seconds_sum").values())


def test_every_step_of_a_batch_is_measured_and_its_samples_are_counted(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    server.wait_until_idle()
    # Rounds follow each other: after this job no step of a cancelled one is under way.
    follow(stub.Generate(request(num_inference_steps=1)))
    before = scrape(server)
    stream = follow(stub.Generate(request(num_inference_steps=7, num_images=2)))
    after = scrape(server)

    def moved(name: str) -> float:
        return after.value(name) - before.value(name)

    assert moved("hidream_step_seconds_count") == 7
    # Guidance takes two samples an image.
    assert moved("hidream_step_samples_total") == 7 * 2 * 2
    durations = [event.progress.step_duration for event in stream.of_kind("progress")]
    told_seconds = sum(duration.ToTimedelta().total_seconds() for duration in durations)
    # A slow caller may miss a step; each that it was told was measured.
    assert moved("hidream_step_seconds_sum") >= told_seconds * 0.99 > 0


def test_prompts_that_were_encoded_already_are_counted_as_hits(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    server.wait_until_idle()
    # Rounds follow each other: after this job no prompt of a cancelled one is read.
    follow(stub.Generate(request(num_inference_steps=1)))
    before = scrape(server)

    def moved() -> tuple[float, float]:
        after = scrape(server)
        names = ("hidream_prompt_cache_hits_total", "hidream_prompt_cache_misses_total")
        return tuple(after.value(name) - before.value(name) for name in names)  # type: ignore[return-value]

    prompt = "a prompt that no other test has"
    follow(stub.Generate(request(prompt, num_inference_steps=1)))
    # Guidance also takes the empty prompt, which is always there and counts for nothing.
    assert moved() == (0, 1)
    follow(stub.Generate(request(prompt, num_inference_steps=1, negative_prompt="neither has any this one")))
    assert moved() == (1, 2)


@pytest.fixture(scope="module")
def single_file_server() -> Iterator[LiveServer]:
    """A server of its own, which draws one job at a time, on one rank that a test may kill."""
    with running_server(
        "--metrics-port", "0", "--grace-seconds", "0", "--devices", "0", "--max-running-jobs", "1"
    ) as live:
        yield live


def test_the_queue_the_running_jobs_and_the_restarts_are_those_of_the_server(
    single_file_server: LiveServer,
) -> None:
    server = single_file_server

    def gauges() -> tuple[float, float, float, float]:
        samples = scrape(server)
        names = (
            "hidream_store_queued_jobs",
            "hidream_store_running_jobs",
            "hidream_rank_restarts_total",
            "hidream_serving",
        )
        return tuple(samples.value(name) for name in names)  # type: ignore[return-value]

    assert gauges() == (0, 0, 0, 1)
    with server.stub() as stub:
        calls = [stub.Generate(request(num_inference_steps=150, width=256, height=256)) for _ in range(3)]
        wait_until(lambda: gauges() == (2, 1, 0, 1), TIMEOUT_SECONDS, "one job runs and two wait")
        os.kill(server.rank_pids()[0], signal.SIGKILL)
        wait_until(lambda: gauges() == (2, 1, 1, 1), TIMEOUT_SECONDS, "the rank was replaced")
        samples = scrape(server)
        assert samples.value("hidream_running_jobs") == 1
        assert samples.value("hidream_store_oldest_queued_job_seconds") > 0
        # From the first step on there is something to estimate by.
        wait_until(
            lambda: scrape(server).value("hidream_store_queue_seconds") > 0, TIMEOUT_SECONDS, "estimated"
        )
        for call in calls:
            call.cancel()
        wait_until(lambda: gauges() == (0, 0, 1, 1), TIMEOUT_SECONDS, "no job is left")
        follow(stub.Generate(request(num_inference_steps=1, num_images=2)))
    samples = scrape(server)
    assert samples.value("hidream_accepted_jobs_total") == 4
    assert samples.value("hidream_jobs_total", state="CANCELLED", reason="CALLER_LEFT") == 3
    assert samples.value("hidream_jobs_total", state="SUCCEEDED", reason="") == 1
    assert samples.value("hidream_images_total") == 2
    assert samples.value("hidream_job_queue_seconds_count") == 4
    assert samples.value("hidream_job_seconds_count", state="SUCCEEDED") == 1
    assert samples.value("hidream_store_queue_seconds") == 0
