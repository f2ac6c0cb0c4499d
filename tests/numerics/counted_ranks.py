"""Real ranks on gloo that count what a step costs them, forked from a process that has all imports."""

from __future__ import annotations

import json
import multiprocessing
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hidream_grpc.devices.device import open_device
from hidream_grpc.model.costs.steps import Sample
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.weights import load_share
from scripts.bench.counting import count_bytes_sent
from scripts.bench.forwards import exact_transformer
from tests.numerics.rank_costs import step_costs

SAMPLE = Sample(height=12, width=12, num_t5_tokens=7, num_llama_tokens=5)
# Some sample groups get one more than others.
NUM_ROWS = 5
_TIMEOUT = timedelta(seconds=60)


@torch.inference_mode()
def count(layout: Layout, rank: int, checkpoint: Path, answers: Path) -> None:
    """Be one rank of a layout for one step; writes its costs to a file."""
    torch.set_num_threads(1)
    groups = ParallelGroups(layout, rank)
    axes = count_bytes_sent(groups)
    dist.init_process_group(
        "gloo", init_method=f"file://{answers}/store", rank=rank, world_size=layout.world_size
    )
    groups.connect(_TIMEOUT, _TIMEOUT)
    device = open_device("cpu", 0)
    config = json.loads((checkpoint / "config.json").read_text())
    transformer = exact_transformer(config, device, groups)
    load_share(transformer, checkpoint, device)
    costs = step_costs(transformer, groups, axes, config, SAMPLE, NUM_ROWS)
    (answers / f"{rank}.json").write_text(json.dumps(asdict(costs)))
    dist.barrier()
    groups.disconnect()
    dist.destroy_process_group()


def main(checkpoint: Path, answers: Path, layouts: list[str]) -> None:
    """Count one layout after another, each rank in a process of its own."""
    context = multiprocessing.get_context("fork")
    for text in layouts:
        layout = parse_layout(text)
        folder = answers / text
        folder.mkdir()
        ranks = [
            context.Process(target=count, args=(layout, rank, checkpoint, folder))
            for rank in range(layout.world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{text}: {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
