"""Real ranks on gloo that compile for one shape of a step, then draw, and tell what they did.

In processes of their own, since torch's compiler has one state for a whole process.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as compiler_config
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from hidream_grpc.devices.device import open_device
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.denoising.state import StepBatch
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from tests.support.denoising import parameters

# Not square, so with a padding token; two samples, as one image with guidance has; long prompts.
NAMED = StepShape(width=64, height=96, num_samples=2, prompt_tokens=192)
_REQUESTS: dict[str, tuple[dict[str, Any], ...]] = {
    "guided": ({"width": 64, "height": 96, "prompt_tokens": 192},),
    "two without guidance": (
        {"width": 64, "height": 96, "prompt_tokens": 192, "guidance_scale": 1.0},
        {"width": 64, "height": 96, "prompt_tokens": 192, "guidance_scale": 1.0, "seed": 8},
    ),
    "other size": ({"width": 80, "height": 96, "prompt_tokens": 192},),
    "more samples": ({"width": 64, "height": 96, "prompt_tokens": 192, "num_images": 2},),
    "short prompt": ({"width": 64, "height": 96},),
    "longer prompt": ({"width": 64, "height": 96, "prompt_tokens": 256},),
}
OF_THE_NAMED_SHAPE = ("guided", "two without guidance")
OF_OTHER_PROMPTS = ("short prompt", "longer prompt")
_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Step:
    """One step's forward on one rank.

    relative_difference: of the predicted noise from the same forward without any compiled code.
    num_compiled_calls: pieces of compiled code that ran.
    num_compiled: pieces that were compiled meanwhile.
    """

    relative_difference: float
    num_compiled_calls: int
    num_compiled: int


@dataclass(frozen=True)
class CompiledRank:
    """What one rank did.

    had_group: when it compiled.
    num_compiled: pieces of code that it compiled then.
    num_compiled_calls: how often these ran in the step for which they were compiled.
    steps: what it did then, by the name of the requests.
    """

    had_group: bool
    num_compiled: int
    num_compiled_calls: int
    steps: dict[str, Step]


def _num_compiled() -> int:
    return int(counters["frames"]["ok"])


def _num_compiled_calls(profiled: profile) -> int:
    return sum("Torch-Compiled Region" in event.name for event in profiled.events())


def _take_step(model: HiDreamModel, requests: tuple[dict[str, Any], ...]) -> Step:
    before = _num_compiled()
    batch = StepBatch.collect([model.begin(parameters(**request)) for request in requests])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        prediction = model.predict(batch)
    num_compiled = _num_compiled() - before
    with torch.compiler.set_stance("force_eager"):
        expected = model.predict(batch)
    return Step(
        relative_difference=((prediction - expected).abs().max() / expected.abs().max()).item(),
        num_compiled_calls=_num_compiled_calls(profiled),
        num_compiled=num_compiled,
    )


@torch.inference_mode()
def _be_rank(
    rank: int, checkpoint: Path, layout: Layout, folder: Path, weights: WeightFormats, others: Connection
) -> None:
    torch.set_num_threads(1)
    groups = ParallelGroups(layout, rank)
    model = HiDreamModel.from_pretrained(checkpoint, None, open_device("cpu", 0), groups, weights=weights)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model.compile([NAMED])
    had_group, num_compiled = dist.is_initialized(), _num_compiled()
    others.send("compiled")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=layout.world_size
    )
    groups.connect(_TIMEOUT, _TIMEOUT)
    steps = {name: _take_step(model, requests) for name, requests in _REQUESTS.items()}
    compiled_rank = CompiledRank(had_group, num_compiled, _num_compiled_calls(profiled), steps)
    (folder / f"{rank}.json").write_text(json.dumps(asdict(compiled_rank)))
    dist.barrier()
    groups.disconnect()
    dist.destroy_process_group()


def main(
    checkpoint: Path, layout: Layout, folder: Path, backend: str, transformer_weights: WeightFormat
) -> None:
    """Start one rank after another, each when the one before has compiled; wait for all.

    Args:
        checkpoint: its folder.
        layout: of the ranks.
        folder: where each rank writes what it did.
        backend: of torch's compiler, instead of the one that the service uses.
        transformer_weights: format of the transformer.
    """
    torch.compile = partial(torch.compile, backend=backend)  # type: ignore[assignment]
    # Not to spend six seconds on trying instructions that the processor has.
    compiler_config.cpp.vec_isa_ok = True
    weights = WeightFormats(transformer=transformer_weights)
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(layout.world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_be_rank, args=(rank, checkpoint, layout, folder, weights, sender))
        process.start()
        ranks.append(process)
        sender.close()
        receiver.recv()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"ranks ended with {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        parse_layout(sys.argv[2]),
        Path(sys.argv[3]),
        sys.argv[4],
        WeightFormat(sys.argv[5]),
    )
