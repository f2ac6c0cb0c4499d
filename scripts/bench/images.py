"""The same images from a running service, through a real client, and from the library's bare pipeline.

Both have the demo model and the CPU; the service divides the same number of threads over its ranks.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import HiDreamImagePipeline
from diffusers.utils import logging as diffusers_logging

from hidream.client import Client
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path

PROMPT = "a red circle on a blue background"
GUIDANCE_SCALE = 3.5
NUM_THREADS = 2
# As many ranks as the pipeline has threads, each with one half of the guidance.
LAYOUT = "cfg=2"
START_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What is generated: a square of one image, with guidance.

    Attributes:
        side_pixels: width and height.
        num_inference_steps: denoising steps.
    """

    side_pixels: int
    num_inference_steps: int

    def options(self, seed: int) -> dict[str, Any]:
        """Options of `Client.generate`."""
        return {
            "width": self.side_pixels,
            "height": self.side_pixels,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": GUIDANCE_SCALE,
            "seed": seed,
        }


@dataclass(frozen=True, slots=True)
class GenerationTimes:
    """How long one image took, counted from its request.

    Attributes:
        first_step_seconds: until the first denoising step had ended, as far as the caller could see.
        total_seconds: until the image was there.
    """

    first_step_seconds: float
    total_seconds: float


@contextmanager
def running_service() -> Iterator[str]:
    """The service with its demo model; yields its address."""
    with TemporaryDirectory(prefix="hidream-bench-") as data_dir:
        command = [sys.executable, "-m", "hidream_grpc", "serve"]
        where = ["--listen", "127.0.0.1:0", "--data-dir", data_dir]
        model = ["--model-path", str(demo_checkpoint_path())]
        ranks = ["--device-type", "cpu", "--layout", LAYOUT, "--threads-per-rank", "1"]
        with serving([*command, *where, *model, *ranks]) as (_, address):
            yield address


@contextmanager
def serving(words: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service with this command line, and its address, once it serves."""
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = []
        for line in process.stderr:
            log.append(line)
            if match := re.search(r"listening on (\S+:\d+)", line):
                break
        else:
            raise SystemExit(f"the service did not start:\n{''.join(log)}")
        # A full pipe would stop the service.
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        try:
            with Client(match[1]) as client:
                client.wait_until_serving(START_TIMEOUT_SECONDS)
            yield process, match[1]
        finally:
            process.terminate()
            reader.join()


class BarePipeline:
    """`HiDreamImagePipeline` of diffusers in this process, told not to rescale the size it is asked for."""

    def __init__(self, request: ImageRequest) -> None:
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        torch.set_num_threads(NUM_THREADS)
        self._pipeline: Any = HiDreamImagePipeline.from_pretrained(
            demo_checkpoint_path(), dtype=torch.float32
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.default_sample_size = request.side_pixels // self._pipeline.vae_scale_factor
        self._request = request

    def generate(self, seed: int) -> GenerationTimes:
        """Generate one image; blocks."""
        start = time.perf_counter()
        step_ends: list[float] = []

        def note_step(*_: Any) -> dict[str, Any]:
            step_ends.append(time.perf_counter() - start)
            return {}

        side = self._request.side_pixels
        image = self._pipeline(
            PROMPT,
            height=side,
            width=side,
            num_inference_steps=self._request.num_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(seed),
            callback_on_step_end=note_step,
        ).images[0]
        assert image.size == (side, side)
        return GenerationTimes(step_ends[0], time.perf_counter() - start)
