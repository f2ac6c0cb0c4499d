"""Figure 3 of the design: k callers at once ÷ k calls of the bare pipeline in a row.

Each caller has a connection of its own to a running service (demo model, CPU, two ranks of one thread)
and asks for one image; all ask at the same moment. The bare `HiDreamImagePipeline` of diffusers (one
process, two threads) generates the same images one after another, as if all had been asked for when it
starts. Prints one JSON line with, for each k: images a second of both and their ratio (above 1 the
service is faster), and the 95th percentile of the time from the asking to the end of the first denoising
step, of both, and their ratio (below 1 the service answers sooner).

    python -m scripts.bench.concurrency [--callers 1,4,16] [--rounds 3] [--steps 8] [--side 256]
"""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Annotated

import typer

from hidream.client import Client
from hidream.events import Progress, Succeeded
from scripts.bench.images import (
    PROMPT,
    START_TIMEOUT_SECONDS,
    BarePipeline,
    GenerationTimes,
    ImageRequest,
    running_service,
)
from scripts.bench.report import Value, percentile, report, say


def main(
    callers: Annotated[str, typer.Option(help="numbers of callers, with commas between")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="times that each number is measured")] = 3,
    steps: Annotated[int, typer.Option(help="denoising steps of an image")] = 8,
    side: Annotated[int, typer.Option(help="width and height, in pixels")] = 256,
) -> None:
    """Measure each number of callers, in turns with the bare pipeline."""
    request = ImageRequest(side_pixels=side, num_inference_steps=steps)
    pipeline = BarePipeline(request)
    with running_service() as address:
        pipeline.generate(0)
        _generate_at_once(address, request, 1)
        results = []
        for num_callers in (int(part) for part in callers.split(",")):
            served: list[list[GenerationTimes]] = []
            bare: list[list[GenerationTimes]] = []
            for number in range(1, rounds + 1):
                served.append(_generate_at_once(address, request, num_callers))
                bare.append(_generate_in_a_row(pipeline, num_callers))
                say(
                    f"{num_callers} callers, round {number} of {rounds}: "
                    f"served in {_last(served[-1]):.2f} s, bare in {_last(bare[-1]):.2f} s"
                )
            results.append(_compare(num_callers, served, bare))
    report("concurrency", callers=results, rounds=rounds, num_inference_steps=steps, side_pixels=side)


def _generate_at_once(address: str, request: ImageRequest, num_callers: int) -> list[GenerationTimes]:
    """Generate one image for each caller, all at once."""
    barrier = threading.Barrier(num_callers, timeout=START_TIMEOUT_SECONDS)

    def generate(seed: int, client: Client) -> GenerationTimes:
        client.info()  # connects
        barrier.wait()
        start = time.perf_counter()
        first_step_seconds = None
        for event in client.generate(PROMPT, **request.options(seed)):
            if isinstance(event, Progress) and first_step_seconds is None:
                first_step_seconds = time.perf_counter() - start
            last = event
        assert isinstance(last, Succeeded)
        assert first_step_seconds is not None
        return GenerationTimes(first_step_seconds, time.perf_counter() - start)

    with ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for _ in range(num_callers)]
        with ThreadPoolExecutor(num_callers) as pool:
            return list(pool.map(generate, range(1, num_callers + 1), clients))


def _generate_in_a_row(pipeline: BarePipeline, num_images: int) -> list[GenerationTimes]:
    """Generate images one after another; the seconds of all count from the first one's start."""
    start = time.perf_counter()
    timed = []
    for seed in range(1, num_images + 1):
        waited_seconds = time.perf_counter() - start
        own = pipeline.generate(seed)
        timed.append(
            GenerationTimes(waited_seconds + own.first_step_seconds, waited_seconds + own.total_seconds)
        )
    return timed


def _last(timed: list[GenerationTimes]) -> float:
    return max(times.total_seconds for times in timed)


def _compare(
    num_callers: int, served: list[list[GenerationTimes]], bare: list[list[GenerationTimes]]
) -> dict[str, Value]:
    served_per_second, bare_per_second = (
        num_callers / statistics.median(_last(timed) for timed in rounds) for rounds in (served, bare)
    )
    served_first, bare_first = (
        percentile([times.first_step_seconds for timed in rounds for times in timed], 95)
        for rounds in (served, bare)
    )
    return {
        "num_callers": num_callers,
        "throughput_ratio": round(served_per_second / bare_per_second, 3),
        "served_images_per_second": round(served_per_second, 4),
        "bare_images_per_second": round(bare_per_second, 4),
        "first_progress_p95_ratio": round(served_first / bare_first, 3),
        "served_first_progress_p95_seconds": round(served_first, 3),
        "bare_first_progress_p95_seconds": round(bare_first, 3),
    }


if __name__ == "__main__":
    typer.run(main)
