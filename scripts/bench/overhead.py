"""Figure 1 of the design: what the service costs over the bare pipeline.

The same pictures, drawn in turn by a real gRPC stream from a running service (demo model, CPU, two
ranks of one thread) and by the bare `HiDreamImagePipeline` of diffusers in this one process (two
threads). Prints one JSON line; the ratio is service ÷ pipeline, of the medians. 1.0 is the goal.

    python scripts/bench/overhead.py [--rounds 9] [--steps 24] [--side 256]
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from diffusers import HiDreamImagePipeline
from diffusers.utils import logging as diffusers_logging

from hidream.client import Client
from hidream_grpc.model.demo import demo_checkpoint_path

PROMPT = "a red circle on a blue background"
GUIDANCE_SCALE = 3.5
NUM_THREADS = 2


@contextmanager
def running_service() -> Iterator[str]:
    """The service with its demo model; yields its address."""
    command = [sys.executable, "-m", "hidream_grpc", "serve", "--listen", "127.0.0.1:0"]
    model = ["--model-path", str(demo_checkpoint_path())]
    ranks = ["--device-type", "cpu", "--devices", "0,1", "--threads-per-rank", "1"]
    with subprocess.Popen([*command, *model, *ranks], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if match := re.search(r"listening on (\S+:\d+)", line):
                break
        else:
            raise SystemExit("the service did not start")
        try:
            yield match[1]
        finally:
            process.terminate()
            process.stderr.read()


def load_pipeline(side: int) -> HiDreamImagePipeline:
    """The bare pipeline, told not to rescale the size that it is asked for."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    torch.set_num_threads(NUM_THREADS)
    pipeline = HiDreamImagePipeline.from_pretrained(demo_checkpoint_path(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.default_sample_size = side // pipeline.vae_scale_factor
    return pipeline


def main(
    rounds: Annotated[int, typer.Option(help="pictures of each kind")] = 9,
    steps: Annotated[int, typer.Option(help="denoising steps of a picture")] = 24,
    side: Annotated[int, typer.Option(help="width and height, in pixels")] = 256,
) -> None:
    """Draw in turns, print the ratio."""
    pipeline = load_pipeline(side)

    def draw_bare(seed: int) -> float:
        start = time.perf_counter()
        image = pipeline(
            PROMPT,
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        assert image.size == (side, side)
        return time.perf_counter() - start

    def draw_served(seed: int) -> float:
        start = time.perf_counter()
        (image,) = client.draw(
            PROMPT, width=side, height=side, num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE, seed=seed,
        )  # fmt: skip
        assert (image.width, image.height) == (side, side)
        return time.perf_counter() - start

    with running_service() as address, Client(address) as client:
        client.wait_until_serving(300)
        draw_bare(0)
        draw_served(0)
        bare_seconds, served_seconds = [], []
        for seed in range(1, rounds + 1):
            bare_seconds.append(draw_bare(seed))
            served_seconds.append(draw_served(seed))
    bare, served = statistics.median(bare_seconds), statistics.median(served_seconds)
    print(
        json.dumps(
            {
                "figure": "service_cost",
                "ratio": round(served / bare, 3),
                "served_seconds": round(served, 3),
                "bare_seconds": round(bare, 3),
                "rounds": rounds,
                "num_inference_steps": steps,
                "side_pixels": side,
            }
        )
    )


if __name__ == "__main__":
    typer.run(main)
