"""Figure 2 of the design: our exact forward ÷ the library's forward, in operations and in time.

At 512×512, 1024×768 and 1024×1024 both forwards get the same inputs in turns, two samples each, as one
image with guidance has. On a CPU with the demo model's weights, and the outputs are compared; with
`--real` with random weights of the real model's dimensions: of all its blocks, or of the first of each
kind, which a CPU can hold. What ours does once per prompt is not in its time. Prints one JSON line: for
each size the counted operations at the real model's dimensions and their ratio, and median times of the
measured model, their ratio, and TFLOP/s.

    python -m scripts.bench.forward [--rounds 7] [--threads 2] [--compiled]
    python -m scripts.bench.forward --device-type cuda --real [--compiled]
    python -m scripts.bench.forward --real --blocks 1 --samples 1 --rounds 3
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from diffusers import HiDreamImageTransformer2DModel
from torch import Tensor

from hidream_grpc.devices.device import Device, open_device
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.loading import quieten_libraries
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.transformer.model import HiDreamTransformer
from hidream_grpc.model.weights import load_share
from scripts.bench.flops import (
    HIDREAM_I1_CONFIG,
    VAE_SCALE_FACTOR,
    exact_forward_flops,
    library_forward_flops,
)
from scripts.bench.forwards import (
    condition,
    exact_transformer,
    fill_at_random,
    library_forward,
    library_transformer,
    random_inputs,
    rank_rows,
)
from scripts.bench.report import Value, report, say

SIZES_PIXELS = ((512, 512), (1024, 768), (1024, 1024))
NUM_WARM_UPS = 2


def main(
    device_type: Annotated[str, typer.Option(help="cpu, cuda or npu")] = "cpu",
    real: Annotated[bool, typer.Option("--real", help="the real model's dimensions")] = False,
    blocks: Annotated[int | None, typer.Option(help="of each kind, with --real; all without")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="both by torch.compile")] = False,
    samples: Annotated[int, typer.Option(help="of a forward")] = 2,
    rounds: Annotated[int, typer.Option(help="forwards of each kind and size")] = 7,
    threads: Annotated[int, typer.Option(help="of torch on the CPU")] = 2,
) -> None:
    """Run both forwards in turns, print the ratios."""
    quieten_libraries()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = open_device(device_type, 0)
    config, library, exact = _random_transformers(device, blocks) if real else _demo_transformers(device)
    if compiled:
        library.compile()
        exact.compile()
    with torch.inference_mode():
        sizes = [
            _compare(config, library, exact, device, width, height, samples, rounds, has_outputs=not real)
            for width, height in SIZES_PIXELS
        ]
    report(
        "exact_forward",
        device_type=device_type,
        model="HiDream-I1, random weights" if real else "demo",
        double_and_single_blocks=[config["num_layers"], config["num_single_layers"]],
        dtype=str(device.dtype).removeprefix("torch."),
        mode="compiled" if compiled else "eager",
        sizes=sizes,
        batch_size=samples,
        rounds=rounds,
        num_threads=threads,
    )


def _demo_transformers(
    device: Device,
) -> tuple[Mapping[str, Any], HiDreamImageTransformer2DModel, HiDreamTransformer]:
    folder = demo_checkpoint_path() / "transformer"
    config = json.loads((folder / "config.json").read_text())
    library = HiDreamImageTransformer2DModel.from_pretrained(folder, dtype=device.dtype)
    exact = exact_transformer(config, device, ParallelGroups(Layout()))
    load_share(exact, folder, device)
    return config, library.to(device.torch_device).eval(), exact


def _random_transformers(
    device: Device, blocks: int | None
) -> tuple[Mapping[str, Any], HiDreamImageTransformer2DModel, HiDreamTransformer]:
    config = dict(HIDREAM_I1_CONFIG)
    if blocks is not None:
        llama_layers = config["llama_layers"][: 2 * blocks]
        config |= {"num_layers": blocks, "num_single_layers": blocks, "llama_layers": llama_layers}
    library = library_transformer(config, device.dtype)
    exact = exact_transformer(config, device, ParallelGroups(Layout()))
    return (
        config,
        fill_at_random(library, device.torch_device),
        fill_at_random(exact, device.torch_device),
    )


def _compare(
    config: Mapping[str, Any],
    library: HiDreamImageTransformer2DModel,
    exact: HiDreamTransformer,
    device: Device,
    width: int,
    height: int,
    samples: int,
    rounds: int,
    *,
    has_outputs: bool,
) -> dict[str, Value]:
    sample = Sample(height=height // VAE_SCALE_FACTOR, width=width // VAE_SCALE_FACTOR)
    inputs = random_inputs(config, sample, samples, device.torch_device, device.dtype)
    rows = rank_rows(exact, inputs, condition(exact, inputs))
    forwards: tuple[Callable[[], Tensor], ...] = (
        lambda: library_forward(library, inputs),
        lambda: exact(rows),
    )
    for _ in range(NUM_WARM_UPS):
        expected, got = (forward() for forward in forwards)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for forward, of_forward in zip(forwards, seconds, strict=True):
            of_forward.append(_seconds(forward, device))
    library_seconds, exact_seconds = (statistics.median(of_forward) for of_forward in seconds)
    say(f"{width}×{height}: library {library_seconds:.4f} s, exact {exact_seconds:.4f} s")

    flops, real_flops = (
        (library_forward_flops(of, sample), exact_forward_flops(of, sample))
        for of in (exact.config, HIDREAM_I1.transformer)
    )
    values: dict[str, Value] = {
        "width": width,
        "height": height,
        "real_flop_ratio": round(real_flops[1] / real_flops[0], 4),
        "real_library_tflop": round(real_flops[0] / 1e12, 2),
        "real_exact_tflop": round(real_flops[1] / 1e12, 2),
        # Of two forwards next to each other, so that what else the machine does slows both.
        "wall_ratio": round(statistics.median(b / a for a, b in zip(*seconds, strict=True)), 3),
        "flop_ratio": round(flops[1] / flops[0], 4),
        "library_milliseconds": round(1e3 * library_seconds, 2),
        "exact_milliseconds": round(1e3 * exact_seconds, 2),
        "library_tflop_per_second": round(samples * flops[0] / library_seconds / 1e12, 4),
        "exact_tflop_per_second": round(samples * flops[1] / exact_seconds / 1e12, 4),
    }
    if has_outputs:
        # Random weights flip a token's experts at the smallest rounding.
        difference = (got - expected).abs().max() / expected.abs().max()
        values["largest_relative_difference"] = float(f"{difference.item():.1e}")
    return values


def _seconds(forward: Callable[[], Tensor], device: Device) -> float:
    device.synchronize()
    start = time.perf_counter()
    forward()
    device.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
