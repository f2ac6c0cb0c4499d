"""What callers are told about the time to come, against what then came."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from hidream.v1 import job_pb2
from tests.support.live_server import LiveServer, running_server
from tests.support.streams import Stream, follow, request

MAX_MEDIAN_ERROR = 0.25
TOKENS = ("the-token-of-one-caller", "the-token-of-another-caller")
SIDES_PIXELS = (128, 256)
NUM_STEPS = 12
NUM_JOBS = 12
NUM_RUNNING = 3
NUM_BURSTS = 4


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server of two callers that has measured nothing yet, and draws three jobs at a time."""
    tokens_file = tmp_path / "tokens"
    tokens_file.write_text("".join(f"caller-{n} {token}\n" for n, token in enumerate(TOKENS)))
    flags = (
        "--tokens-file",
        str(tokens_file),
        "--max-running-jobs",
        str(NUM_RUNNING),
        "--grace-seconds",
        "5",
    )
    with running_server(*flags) as server:
        yield server


def test_on_a_steady_load_the_median_error_of_estimates_is_under_a_quarter(fresh_server: LiveServer) -> None:
    with fresh_server.stub() as stub, ThreadPoolExecutor(NUM_JOBS) as threads:

        def draw(number: int) -> Stream:
            side = SIDES_PIXELS[number // 2 % 2]
            spec = request(width=side, height=side, num_inference_steps=NUM_STEPS, seed=number)
            credentials = (("authorization", f"Bearer {TOKENS[number % 2]}"),)
            return follow(stub.Generate(spec, metadata=credentials))

        # In the first one every shape of step is measured that the load consists of.
        bursts = [list(threads.map(draw, range(NUM_JOBS))) for _ in range(NUM_BURSTS)][1:]
    wait_errors = [[error for stream in burst for error in _wait_errors(stream)] for burst in bursts]
    remaining_errors = [
        [error for stream in burst for error in _remaining_errors(stream)] for burst in bursts
    ]
    assert all(len(errors) >= NUM_JOBS - NUM_RUNNING for errors in wait_errors)
    # One for each step of each job, of which a reader may miss some.
    assert all(len(errors) > NUM_JOBS * NUM_STEPS / 2 for errors in remaining_errors)
    # The load is steady, a host that others use is not: where estimates are wrong, they are in every burst.
    assert min(median(errors) for errors in wait_errors) < MAX_MEDIAN_ERROR
    assert min(median(errors) for errors in remaining_errors) < MAX_MEDIAN_ERROR


def _wait_errors(stream: Stream) -> Iterator[float]:
    start = _seconds(stream.of_kind("started")[0].time)
    for event in stream.of_kind("queued"):
        yield from _error(event.queued, "estimated_wait", start - _seconds(event.time))


def _remaining_errors(stream: Stream) -> Iterator[float]:
    end = _seconds(stream.events[-1].time)
    for event in stream.of_kind("progress"):
        yield from _error(event.progress, "estimated_remaining", end - _seconds(event.time))


def _error(
    message: job_pb2.Queued | job_pb2.JobProgress, field: str, actual_seconds: float
) -> Iterator[float]:
    """Relative to what came, where something was foreseen and it did not come at once."""
    if message.HasField(field) and actual_seconds > 0:  # type: ignore[arg-type]
        yield abs(_seconds(getattr(message, field)) - actual_seconds) / actual_seconds


def _seconds(value: Timestamp | Duration) -> float:
    return value.ToNanoseconds() / 1e9
