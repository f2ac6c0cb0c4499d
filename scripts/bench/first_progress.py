"""Figure 4 of the design: how soon a fresh request on a busy server moves, in steps.

Some long requests keep a running service busy (demo model, CPU, two ranks of one thread). Fresh requests
of the same size come one at a time, at moments spread evenly over a step, and the time until the first
progress event of each is divided by the time of one step of the busy server with that request in it. One
step must end, the request's own must follow: at most 2 is the goal. Prints one JSON line; ratios are medians
over the fresh requests, and the other one compares with the step before the request came, which is smaller.

    python -m scripts.bench.first_progress [--busy 3] [--rounds 12] [--side 256]
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import typer

from hidream.client import Client
from hidream.events import Progress
from scripts.bench.images import PROMPT, ImageRequest, running_service
from scripts.bench.report import percentile, report, say

NUM_LONG_STEPS = 150
NUM_FRESH_STEPS = 4
EVENT_TIMEOUT_SECONDS = 120.0


def main(
    busy: Annotated[int, typer.Option(help="long requests that keep the service busy")] = 3,
    rounds: Annotated[int, typer.Option(help="fresh requests")] = 12,
    side: Annotated[int, typer.Option(help="width and height, in pixels")] = 256,
) -> None:
    """Send fresh requests to a busy service, print the ratio."""
    long_request = ImageRequest(side_pixels=side, num_inference_steps=NUM_LONG_STEPS)
    fresh_request = ImageRequest(side_pixels=side, num_inference_steps=NUM_FRESH_STEPS)
    first_progress_seconds: list[float] = []
    step_seconds: list[float] = []
    ratios: list[float] = []
    ratios_to_step_before: list[float] = []
    with running_service() as address, Client(address) as client, ExitStack() as stack:
        step_ends = [stack.enter_context(_long_request(address, long_request)) for _ in range(busy)]
        for number in range(rounds):
            before = _wait_for_steps(step_ends)
            # An arrival at a known part of the step that has just begun.
            time.sleep((number + 0.5) / rounds * before)
            start = time.perf_counter()
            steps: list[float] = []
            for event in client.generate(PROMPT, **fresh_request.options(seed=number)):
                if isinstance(event, Progress):
                    if not steps:
                        first_progress_seconds.append(time.perf_counter() - start)
                    steps.append(event.step_seconds)
            step_seconds.append(statistics.median(steps))
            ratios.append(first_progress_seconds[-1] / step_seconds[-1])
            ratios_to_step_before.append(first_progress_seconds[-1] / before)
            say(
                f"request {number + 1} of {rounds}: first progress after {first_progress_seconds[-1]:.3f} s, "
                f"a step before it {before:.3f} s, with it {step_seconds[-1]:.3f} s"
            )
    report(
        "first_progress",
        ratio=round(statistics.median(ratios), 3),
        p95_ratio=round(percentile(ratios, 95), 3),
        ratio_to_step_before=round(statistics.median(ratios_to_step_before), 3),
        first_progress_seconds=round(statistics.median(first_progress_seconds), 4),
        step_seconds=round(statistics.median(step_seconds), 4),
        num_busy_requests=busy,
        rounds=rounds,
        side_pixels=side,
    )


@contextmanager
def _long_request(address: str, request: ImageRequest) -> Iterator[queue.SimpleQueue[float]]:
    """Keep one request running at any time; yields the seconds of each step as it ends."""
    step_ends: queue.SimpleQueue[float] = queue.SimpleQueue()
    is_over = threading.Event()

    def follow() -> None:
        with Client(address) as client:
            while not is_over.is_set():
                for event in client.generate(PROMPT, **request.options(seed=0)):
                    if isinstance(event, Progress):
                        step_ends.put(event.step_seconds)
                    if is_over.is_set():
                        break

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield step_ends
    finally:
        is_over.set()
        thread.join()


def _wait_for_steps(step_ends: list[queue.SimpleQueue[float]]) -> float:
    """Wait until a step of all long requests has just ended; returns its seconds."""
    seconds = 0.0
    for ends in step_ends:
        while not ends.empty():
            ends.get()
    # What the last fresh request left behind, its decoding, is over with the second one.
    for _ in range(2):
        for ends in step_ends:
            seconds = ends.get(timeout=EVENT_TIMEOUT_SECONDS)
    return seconds


if __name__ == "__main__":
    typer.run(main)
