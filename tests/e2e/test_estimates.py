"""The times that callers are told in advance, against what then came."""

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
MAX_BURSTS = 12


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server of two callers that has measured nothing yet, and runs three jobs at a time."""
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


# On a machine that does other things the load is not steady.
@pytest.mark.long
@pytest.mark.timeout(600)
def test_on_a_steady_load_the_median_error_of_estimates_is_under_a_quarter(fresh_server: LiveServer) -> None:
    with fresh_server.stub() as stub, ThreadPoolExecutor(NUM_JOBS) as threads:

        def generate(number: int) -> Stream:
            side = SIDES_PIXELS[number // 2 % 2]
            spec = request(width=side, height=side, num_inference_steps=NUM_STEPS, seed=number)
            credentials = (("authorization", f"Bearer {TOKENS[number % 2]}"),)
            return follow(stub.Generate(spec, metadata=credentials))

        def burst() -> list[Stream]:
            return list(threads.map(generate, range(NUM_JOBS)))

        # Every shape of step that the load consists of is measured.
        burst()
        wait_error, remaining_error = 1.0, 1.0
        for _ in range(MAX_BURSTS):
            streams = burst()
            wait_errors = [error for stream in streams for error in _wait_errors(stream)]
            remaining_errors = [error for stream in streams for error in _remaining_errors(stream)]
            assert len(wait_errors) >= NUM_JOBS - NUM_RUNNING
            # One for each step of each job, of which a reader may miss some.
            assert len(remaining_errors) > NUM_JOBS * NUM_STEPS / 2
            wait_error = min(wait_error, median(wait_errors))
            remaining_error = min(remaining_error, median(remaining_errors))
            # The load is steady, a host that others use is not: wrong estimates are wrong in every burst.
            if max(wait_error, remaining_error) < MAX_MEDIAN_ERROR:
                break
    assert wait_error < MAX_MEDIAN_ERROR
    assert remaining_error < MAX_MEDIAN_ERROR


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
    """Relative to what came, where something was estimated and it did not come at once."""
    if message.HasField(field) and actual_seconds > 0:  # type: ignore[arg-type]
        yield abs(_seconds(getattr(message, field)) - actual_seconds) / actual_seconds


def _seconds(value: Timestamp | Duration) -> float:
    return value.ToNanoseconds() / 1e9
