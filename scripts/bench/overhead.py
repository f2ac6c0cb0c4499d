"""Figure 1 of the design: what the service costs over the bare pipeline.

The same images, generated in turn by a real gRPC stream from a running service (demo model, CPU, two
ranks of one thread) and by the bare `HiDreamImagePipeline` of diffusers in this one process (two
threads). Prints one JSON line; the ratio is service ÷ pipeline, the median over pairs. At most 1.0 is the
goal.

    python -m scripts.bench.overhead [--rounds 9] [--steps 24] [--side 256]
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import typer

from hidream.client import Client
from scripts.bench.images import PROMPT, BarePipeline, ImageRequest, running_service
from scripts.bench.report import report, say


def main(
    rounds: Annotated[int, typer.Option(help="images of each kind")] = 9,
    steps: Annotated[int, typer.Option(help="denoising steps of an image")] = 24,
    side: Annotated[int, typer.Option(help="width and height, in pixels")] = 256,
) -> None:
    """Generate in turns, print the ratio."""
    request = ImageRequest(side_pixels=side, num_inference_steps=steps)
    pipeline = BarePipeline(request)

    def generate_served(seed: int) -> float:
        start = time.perf_counter()
        (image,) = client.draw(PROMPT, **request.options(seed))
        assert (image.width, image.height) == (side, side)
        return time.perf_counter() - start

    with running_service() as address, Client(address) as client:
        pipeline.generate(0)
        generate_served(0)
        bare_seconds, served_seconds = [], []
        for seed in range(1, rounds + 1):
            bare_seconds.append(pipeline.generate(seed).total_seconds)
            served_seconds.append(generate_served(seed))
            say(f"round {seed} of {rounds}: bare {bare_seconds[-1]:.2f} s, served {served_seconds[-1]:.2f} s")
    # Of two images next to each other, so that what else the machine does slows both.
    ratios = [served / bare for served, bare in zip(served_seconds, bare_seconds, strict=True)]
    report(
        "service_cost",
        ratio=round(statistics.median(ratios), 3),
        served_seconds=round(statistics.median(served_seconds), 3),
        bare_seconds=round(statistics.median(bare_seconds), 3),
        rounds=rounds,
        num_inference_steps=steps,
        side_pixels=side,
    )


if __name__ == "__main__":
    typer.run(main)
