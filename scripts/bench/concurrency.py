"""Figure 3 of the design: k callers at once ÷ k calls of the bare pipeline in a row.

Each caller has a connection of its own to a running service (demo model, CPU, two ranks of one thread)
and asks for one picture; all ask at the same moment. The bare `HiDreamImagePipeline` of diffusers (one
process, two threads) draws the same pictures one after another, as if all had been asked for when it
starts. Prints one JSON line with, for each k: pictures a second of both and their ratio (above 1 the
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
from scripts.bench.pictures import (
    PROMPT,
    START_TIMEOUT_SECONDS,
    BarePipeline,
    Drawn,
    Picture,
    running_service,
)
from scripts.bench.report import Value, percentile, report, say


def main(
    callers: Annotated[str, typer.Option(help="numbers of callers, with commas between")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="times that each number is measured")] = 3,
    steps: Annotated[int, typer.Option(help="denoising steps of a picture")] = 8,
    side: Annotated[int, typer.Option(help="width and height, in pixels")] = 256,
) -> None:
    """Measure each number of callers, in turns with the bare pipeline."""
    picture = Picture(side_pixels=side, num_inference_steps=steps)
    pipeline = BarePipeline(picture)
    with running_service() as address:
        pipeline.draw(0)
        _draw_at_once(address, picture, 1)
        results = []
        for num_callers in (int(part) for part in callers.split(",")):
            served: list[list[Drawn]] = []
            bare: list[list[Drawn]] = []
            for number in range(1, rounds + 1):
                served.append(_draw_at_once(address, picture, num_callers))
                bare.append(_draw_in_a_row(pipeline, num_callers))
                say(
                    f"{num_callers} callers, round {number} of {rounds}: "
                    f"served in {_last(served[-1]):.2f} s, bare in {_last(bare[-1]):.2f} s"
                )
            results.append(_compare(num_callers, served, bare))
    report("concurrency", callers=results, rounds=rounds, num_inference_steps=steps, side_pixels=side)


def _draw_at_once(address: str, picture: Picture, num_callers: int) -> list[Drawn]:
    """Generate one image for each caller, all at once."""
    barrier = threading.Barrier(num_callers, timeout=START_TIMEOUT_SECONDS)

    def draw(seed: int, client: Client) -> Drawn:
        client.info()  # connects
        barrier.wait()
        start = time.perf_counter()
        first_step_seconds = None
        for event in client.generate(PROMPT, **picture.options(seed)):
            if isinstance(event, Progress) and first_step_seconds is None:
                first_step_seconds = time.perf_counter() - start
            last = event
        assert isinstance(last, Succeeded)
        assert first_step_seconds is not None
        return Drawn(first_step_seconds, time.perf_counter() - start)

    with ExitStack() as stack:
        clients = [stack.enter_context(Client(address)) for _ in range(num_callers)]
        with ThreadPoolExecutor(num_callers) as pool:
            return list(pool.map(draw, range(1, num_callers + 1), clients))


def _draw_in_a_row(pipeline: BarePipeline, num_pictures: int) -> list[Drawn]:
    """Generate images one after another; the seconds of all count from the first one's start."""
    start = time.perf_counter()
    drawn = []
    for seed in range(1, num_pictures + 1):
        waited_seconds = time.perf_counter() - start
        own = pipeline.draw(seed)
        drawn.append(Drawn(waited_seconds + own.first_step_seconds, waited_seconds + own.total_seconds))
    return drawn


def _last(drawn: list[Drawn]) -> float:
    return max(picture.total_seconds for picture in drawn)


def _compare(num_callers: int, served: list[list[Drawn]], bare: list[list[Drawn]]) -> dict[str, Value]:
    served_per_second, bare_per_second = (
        num_callers / statistics.median(_last(drawn) for drawn in rounds) for rounds in (served, bare)
    )
    served_first, bare_first = (
        percentile([picture.first_step_seconds for drawn in rounds for picture in drawn], 95)
        for rounds in (served, bare)
    )
    return {
        "num_callers": num_callers,
        "throughput_ratio": round(served_per_second / bare_per_second, 3),
        "served_pictures_per_second": round(served_per_second, 4),
        "bare_pictures_per_second": round(bare_per_second, 4),
        "first_progress_p95_ratio": round(served_first / bare_first, 3),
        "served_first_progress_p95_seconds": round(served_first, 3),
        "bare_first_progress_p95_seconds": round(bare_first, 3),
    }


if __name__ == "__main__":
    typer.run(main)
