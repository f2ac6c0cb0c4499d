"""What compiling the transformer's blocks gains, and what it costs at boot.

One step's forward, compiled and not in turns, for each shape, named as `--compile-shapes` takes them. Prints
one JSON line: the seconds to compile for all shapes, and for each median milliseconds and their ratio.
What was compiled before comes from torch's cache on disk: for a first boot give it an empty folder.

    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) python -m scripts.bench.compiled [--shapes 256x256x2,512x512x2]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from hidream_grpc.devices.device import Device, open_device
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.checkpoint.step_shapes import StepShape, parse_step_shapes
from hidream_grpc.model.denoising.state import StepBatch
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.pipeline import HiDreamModel
from scripts.bench.report import Value, report, say

NUM_WARM_UPS = 2


@torch.inference_mode()
def main(
    shapes: Annotated[str, typer.Option(help="width x height x samples")] = "256x256x2,512x512x2",
    device_type: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    model_path: Annotated[Path | None, typer.Option(help="HiDream-I1; the demo model when absent")] = None,
    extra_model_path: Annotated[Path | None, typer.Option(help="Llama, where that holds none")] = None,
    rounds: Annotated[int, typer.Option(help="forwards of each kind and shape")] = 21,
    threads: Annotated[int, typer.Option(help="of torch on the CPU")] = 1,
) -> None:
    """Compile for all shapes, then measure each."""
    torch.set_num_threads(threads)
    model_path = model_path or demo_checkpoint_path()
    checkpoint = describe_checkpoint(model_path, extra_model_path)
    parsed = parse_step_shapes(shapes, checkpoint.size_limits, "--shapes")
    device = open_device(device_type, 0)
    model = HiDreamModel.from_pretrained(model_path, extra_model_path, device)
    say(f"compiling for {shapes}")
    compile_seconds = _seconds(lambda: model.compile(parsed), device)
    report(
        "compiled",
        device_type=device_type,
        model=checkpoint.name,
        compile_seconds=round(compile_seconds, 1),
        shapes=[_measure(model, device, shape, rounds) for shape in parsed],
        rounds=rounds,
        num_threads=threads,
    )


def _measure(model: HiDreamModel, device: Device, shape: StepShape, rounds: int) -> dict[str, Value]:
    # Two samples of one image with guidance, where the number is even.
    is_guided = shape.num_samples % 2 == 0
    parameters = GenerationParameters(
        prompt="a red circle on a blue background",
        width=shape.width,
        height=shape.height,
        num_inference_steps=16,
        guidance_scale=4.0 if is_guided else 1.0,
        num_images=shape.num_samples // 2 if is_guided else shape.num_samples,
        seed=0,
        prompt_tokens=shape.prompt_tokens,
    )
    batch = StepBatch.collect([model.begin(parameters)])
    eager_seconds, compiled_seconds = [], []
    for _ in range(NUM_WARM_UPS + rounds):
        with torch.compiler.set_stance("force_eager"):
            eager_seconds.append(_seconds(lambda: model.predict(batch), device))
        compiled_seconds.append(_seconds(lambda: model.predict(batch), device))
    eager, compiled = (
        statistics.median(of_kind[NUM_WARM_UPS:]) for of_kind in (eager_seconds, compiled_seconds)
    )
    say(f"{shape}: eager {eager:.4f} s, compiled {compiled:.4f} s")
    return {
        "shape": str(shape),
        "eager_milliseconds": round(1e3 * eager, 2),
        "compiled_milliseconds": round(1e3 * compiled, 2),
        "wall_ratio": round(compiled / eager, 3),
    }


def _seconds(call: Callable[[], object], device: Device) -> float:
    device.synchronize()
    started = time.perf_counter()
    call()
    device.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
