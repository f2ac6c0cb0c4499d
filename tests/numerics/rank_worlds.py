"""Real ranks on gloo for tests of numbers: forked from one process that has imported everything.

`RankWorlds` lives in the test, `main` in the process that forks. Tasks and answers are files, so that
what a test gets are tensors of every rank.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.engine.protocol.messages import JoinGroup
from hidream_grpc.engine.protocol.processes import die_with_parent
from hidream_grpc.engine.rank.process_group import join_group, leave_group
from hidream_grpc.engine.zygote.store_host import host_store
from hidream_grpc.model.denoising.state import DenoisingState, StepBatch
from hidream_grpc.model.parallel.groups import Axis, ParallelGroups
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from tests.support.denoising import is_denoised

COLLECTIVE_TIMEOUT_SECONDS = 60.0

CallSite = tuple[str, int]


@dataclass(frozen=True)
class Case:
    """Requests that are generated together; each enters one step after the one before it."""

    name: str
    requests: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """What every rank of a world does: generate the cases.

    dtype: of torch, by its name.
    weights: the format of the transformer and of the text encoders.
    left_out: a collective that is not done, by where it is called.
    """

    cases: tuple[Case, ...]
    dtype: str = "float64"
    weights: str = "bfloat16"
    left_out: CallSite | None = None


@dataclass(frozen=True)
class RankResult:
    """What one rank generated in one run.

    first_predictions: of each case, the noise predicted in its first step.
    latents: of each case, the final latents of its requests.
    collectives: where collectives were called.
    """

    first_predictions: dict[str, torch.Tensor] = field(default_factory=dict)
    latents: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    collectives: list[CallSite] = field(default_factory=list)


class RankWorlds:
    """Makes worlds of as many ranks as their layouts say, one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.numerics.rank_worlds"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        self._count = 0

    def run(self, layout: str, checkpoint: Path, runs: Sequence[Run]) -> list[list[RankResult]]:
        """Do some runs in one world, one after another.

        Args:
            layout: as in `--layout`.
            checkpoint: its folder.
            runs: what to do.

        Returns:
            Of each run, the results of the ranks in rank order.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        task = {"folder": str(folder), "layout": layout, "checkpoint": str(checkpoint)}
        print(json.dumps(task | {"runs": [asdict(run) for run in runs]}), file=self._process.stdin)
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer == "done", (folder / "error").read_text() if (folder / "error").exists() else answer
        results = [
            torch.load(folder / f"{rank}.pt", weights_only=False)
            for rank in range(parse_layout(layout).world_size)
        ]
        return [list(of_run) for of_run in zip(*results, strict=True)]

    def close(self) -> None:
        """End the process; its ranks have ended before."""
        self._process.communicate()
        assert self._process.returncode == 0


def denoise_together(
    model: HiDreamModel, requests: Sequence[dict[str, Any]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Generate requests in one batch, each entering one step after the one before it.

    Returns:
        The noise predicted in the first step, and the final latents.
    """
    waiting = [model.begin(GenerationParameters(**request)) for request in requests]
    states, running, first_prediction = list(waiting), list[DenoisingState](), None
    while waiting or running:
        running += waiting[:1]
        waiting = waiting[1:]
        batch = StepBatch.collect(running)
        prediction = model.predict(batch)
        if first_prediction is None:
            first_prediction = prediction
        model.advance(running, batch, prediction)
        running = [state for state in running if not is_denoised(state)]
    assert first_prediction is not None
    return first_prediction, [state.latents for state in states]


def _be_rank(task: dict[str, Any], rank: int, store_port: int) -> list[RankResult]:
    """Do all runs of a task as one rank, which loads the model once for each dtype and format."""
    layout = parse_layout(task["layout"])
    groups = ParallelGroups(layout, rank)

    @cache
    def model_in(dtype: str, weights: WeightFormat) -> HiDreamModel:
        device = CpuDevice()
        device.dtype = getattr(torch, dtype)  # type: ignore[misc]
        formats = WeightFormats(transformer=weights, text_encoders=weights)
        return HiDreamModel.from_pretrained(Path(task["checkpoint"]), None, device, groups, weights=formats)

    command = JoinGroup(
        generation=1,
        world_size=layout.world_size,
        store_port=store_port,
        init_timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
        collective_timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
    )
    join_group(command, groups, rank, CpuDevice.backend, torch.device("cpu"))
    results = []
    for run in task["runs"]:
        result = RankResult()
        with _watched_collectives(result.collectives, run["left_out"]):
            for case in run["cases"]:
                model = model_in(run["dtype"], WeightFormat(run["weights"]))
                prediction, latents = denoise_together(model, case["requests"])
                result.first_predictions[case["name"]] = prediction.clone()
                result.latents[case["name"]] = [x.clone() for x in latents]
        results.append(result)
    leave_group(groups)
    return results


def _without_all_to_all(
    _axis: Axis, tensor: torch.Tensor, _sent: Sequence[int], received: Sequence[int]
) -> torch.Tensor:
    return tensor[torch.arange(sum(received)) % len(tensor)]


_LEFT_OUT: dict[str, Callable[..., torch.Tensor]] = {
    "all_reduce": lambda axis, tensor: tensor,
    "all_gather": lambda axis, tensor: tensor.expand(axis.size, *tensor.shape),
    "reduce_scatter": lambda axis, tensor: tensor[axis.index],
    "all_to_all": _without_all_to_all,
}


@contextmanager
def _watched_collectives(collectives: list[CallSite], left_out: list[Any] | None) -> Iterator[None]:
    """Note where the layers' collectives are called, and leave one out."""

    def watched(name: str) -> Callable[..., torch.Tensor]:
        original = getattr(Axis, name)

        def call(axis: Axis, *arguments: Any) -> torch.Tensor:
            caller = sys._getframe(1)
            # An axis may use one collective to do another: what counts is the layer's call.
            while caller.f_back is not None and Path(caller.f_code.co_filename).name == "groups.py":
                caller = caller.f_back
            site = Path(caller.f_code.co_filename).name, caller.f_lineno
            if axis.size > 1 and site not in collectives:
                collectives.append(site)
            is_left_out = left_out is not None and site == tuple(left_out)
            result: torch.Tensor = (_LEFT_OUT[name] if is_left_out else original)(axis, *arguments)
            return result

        return call

    with ExitStack() as patches:
        for name in _LEFT_OUT:
            patches.enter_context(patch.object(Axis, name, watched(name)))
        yield


def _fork(child: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        die_with_parent(os.getppid())
        child()
        exit_code = 0
    finally:
        os._exit(exit_code)


def _run(task: dict[str, Any]) -> str:
    folder = Path(task["folder"])
    num_ranks = parse_layout(task["layout"]).world_size
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store_port = listener.getsockname()[1]
        store_pid = _fork(lambda: host_store(listener))

    def be_rank(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                torch.save(_be_rank(task, rank, store_port), folder / f"{rank}.pt")
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
            raise

    pids = [_fork(lambda rank=rank: be_rank(rank)) for rank in range(num_ranks)]
    try:
        exit_codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    finally:
        os.kill(store_pid, 9)
        os.waitpid(store_pid, 0)
    return "done" if not any(exit_codes) else f"ranks ended with {exit_codes}"


def main() -> None:
    """Run tasks from the standard input until it ends."""
    for line in sys.stdin:
        sys.stdout.write(_run(json.loads(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # The tensors that ranks save name these classes by the module's own name.
    from tests.numerics import rank_worlds

    rank_worlds.main()
