"""What quantized weights save, what they cost in time, and how far their images are from exact ones.

For each format of the weights, transformer and text encoders alike: the time of a step, and the images of
captions that the demo model has not seen, against the same with exact weights (float32 on a CPU, bfloat16
elsewhere). Images are compared by PSNR, in decibels, and by content (`scripts/demo_model/judge.py`). Prints
one JSON line.

    python -m scripts.bench.weights [--captions 50] [--side-pixels 256] [--shapes 256x256x2,512x512x2]
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from hidream_grpc.devices.device import Device, open_device
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import CheckpointDescription, describe_checkpoint
from hidream_grpc.model.checkpoint.step_shapes import StepShape, parse_step_shapes
from hidream_grpc.model.denoising.state import StepBatch
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from scripts.bench.report import Value, report, say
from scripts.demo_model.captions import Scene
from scripts.demo_model.evaluate import unseen_captions
from scripts.demo_model.judge import judge

NUM_WARM_UPS = 2
IMAGES_A_STEP = 5

Pixels = NDArray[np.uint8]
Caption = tuple[Scene, str]


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike images of the same requests are.

    Attributes:
        median_psnr, least_psnr: in decibels, of all images.
        judged_right: percentage of images whose background, colours and positions are their captions'.
        judged_right_exact: the same of the images that they are compared with.
    """

    median_psnr: float
    least_psnr: float
    judged_right: float
    judged_right_exact: float


def load(weights: WeightFormat, device: Device) -> HiDreamModel:
    """The demo model with all weights in one format."""
    formats = WeightFormats(transformer=weights, text_encoders=weights)
    return HiDreamModel.from_pretrained(demo_checkpoint_path(), None, device, weights=formats)


@torch.inference_mode()
def images_of(
    model: HiDreamModel, checkpoint: CheckpointDescription, captions: Sequence[Caption], side_pixels: int
) -> list[Pixels]:
    """Generate an image of each caption, with the checkpoint's own steps and guidance."""
    images = []
    for start in range(0, len(captions), IMAGES_A_STEP):
        states = [
            model.begin(
                GenerationParameters(
                    prompt=caption,
                    width=side_pixels,
                    height=side_pixels,
                    num_inference_steps=checkpoint.defaults.num_inference_steps,
                    guidance_scale=checkpoint.defaults.guidance_scale,
                    seed=index,
                )
            )
            for index, (_, caption) in enumerate(captions[start : start + IMAGES_A_STEP], start)
        ]
        for _ in range(checkpoint.defaults.num_inference_steps):
            batch = StepBatch.collect(states)
            model.advance(states, batch, model.predict(batch))
        for state in states:
            decoding = model.start_decoding(state, 0)
            while not decoding.is_finished:
                decoding.advance()
            images.append(decoding.pixels())
    return images


def compare(images: Sequence[Pixels], exact: Sequence[Pixels], captions: Sequence[Caption]) -> Likeness:
    """Compare images with exact ones of the same captions."""
    psnrs = [_psnr(image, expected) for image, expected in zip(images, exact, strict=True)]
    return Likeness(
        median_psnr=round(statistics.median(psnrs), 1),
        least_psnr=round(min(psnrs), 1),
        judged_right=_judged_right(images, captions),
        judged_right_exact=_judged_right(exact, captions),
    )


def _psnr(image: Pixels, expected: Pixels) -> float:
    error = float(np.square(image.astype(np.float64) - expected).mean())
    return 10 * math.log10(255**2 / error) if error else 100.0


def _judged_right(images: Sequence[Pixels], captions: Sequence[Caption]) -> float:
    judgements = [
        judge(Image.fromarray(image), scene) for image, (scene, _) in zip(images, captions, strict=True)
    ]
    right = sum(judgement.background and judgement.colour_and_position for judgement in judgements)
    return 100 * right / len(judgements)


@torch.inference_mode()
def main(
    captions: Annotated[int, typer.Option(help="images of each format; 0 for none")] = 50,
    side_pixels: Annotated[int, typer.Option(help="side of those images")] = 256,
    shapes: Annotated[str, typer.Option(help="steps to time, width x height x samples")] = (
        "256x256x2,512x512x2"
    ),
    device_type: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(help="steps of each shape and format")] = 21,
    threads: Annotated[int, typer.Option(help="of torch on the CPU")] = 1,
) -> None:
    """Load the model in each format, time steps in turns, then generate images."""
    torch.set_num_threads(threads)
    device = open_device(device_type, 0)
    checkpoint = describe_checkpoint(demo_checkpoint_path(), None)
    models = {weights: load(weights, device) for weights in WeightFormat}
    steps = [
        _time_steps(models, shape, rounds, device)
        for shape in parse_step_shapes(shapes, checkpoint.size_limits, "--shapes")
    ]
    unseen = unseen_captions(captions, seed=0)
    images = {}
    for weights, model in models.items():
        say(f"generating {captions} images with {weights}")
        images[weights] = images_of(model, checkpoint, unseen, side_pixels)
    likeness: list[dict[str, Value]] = []
    for weights in (each for each in WeightFormat if each.is_quantized and captions):
        found = compare(images[weights], images[WeightFormat.BFLOAT16], unseen)
        likeness.append({"weights": weights, **{name: getattr(found, name) for name in found.__slots__}})
    report(
        "weights",
        ratio=max(ratios[WeightFormat.INT8] for ratios, _ in steps),
        device_type=device_type,
        model=checkpoint.name,
        dtype=str(device.dtype).removeprefix("torch."),
        images=likeness,
        captions=captions,
        side_pixels=side_pixels,
        steps=[times for _, times in steps],
        rounds=rounds,
        num_threads=threads,
    )


def _time_steps(
    models: dict[WeightFormat, HiDreamModel], shape: StepShape, rounds: int, device: Device
) -> tuple[dict[WeightFormat, float], dict[str, Value]]:
    """The ratio of a step's time in each format to that with exact weights, and what to report of it."""
    parameters = GenerationParameters(
        prompt="a red circle on a blue background",
        width=shape.width,
        height=shape.height,
        num_inference_steps=16,
        guidance_scale=1.0,
        num_images=shape.num_samples,
        seed=0,
    )
    batches = {weights: StepBatch.collect([model.begin(parameters)]) for weights, model in models.items()}
    seconds: dict[WeightFormat, list[float]] = {weights: [] for weights in models}
    for _ in range(NUM_WARM_UPS + rounds):
        for weights, model in models.items():
            device.synchronize()
            started = time.perf_counter()
            model.predict(batches[weights])
            device.synchronize()
            seconds[weights].append(time.perf_counter() - started)
    medians = {weights: statistics.median(times[NUM_WARM_UPS:]) for weights, times in seconds.items()}
    # Pairs of neighbours, since other work on the machine slows both.
    ratios = {
        weights: statistics.median(
            mine / exact
            for mine, exact in zip(
                times[NUM_WARM_UPS:], seconds[WeightFormat.BFLOAT16][NUM_WARM_UPS:], strict=True
            )
        )
        for weights, times in seconds.items()
    }
    say(f"{shape}: " + ", ".join(f"{weights} {ratio:.2f}" for weights, ratio in ratios.items()))
    return ratios, {
        "shape": str(shape),
        **{f"{weights}_milliseconds": round(1e3 * median, 2) for weights, median in medians.items()},
        **{f"{weights}_ratio": round(ratio, 3) for weights, ratio in ratios.items() if weights.is_quantized},
    }


if __name__ == "__main__":
    typer.run(main)
