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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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

COLLECTIVE_TIMEOUT_SECONDS = 60.0

CallSite = tuple[str, int]


@dataclass(frozen=True)
class Case:
    """Requests that are drawn together; each enters one step after the one before it."""

    name: str
    requests: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Drawing:
    """What every rank of a layout does: draw the cases with a checkpoint.

    layout: as in `--layout`.
    dtype: of torch, by its name.
    left_out: a collective that is not done, by where it is called.
    """

    layout: str
    checkpoint: str
    cases: tuple[Case, ...]
    dtype: str = "float64"
    left_out: CallSite | None = None


@dataclass(frozen=True)
class Drawn:
    """What one rank drew.

    first_predictions: of each case, the noise predicted in its first step.
    latents: of each case, the final latents of its requests.
    collectives: where collectives were called.
    """

    first_predictions: dict[str, torch.Tensor] = field(default_factory=dict)
    latents: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    collectives: list[CallSite] = field(default_factory=list)


class RankWorlds:
    """Runs drawings on as many ranks as their layouts say, one after another."""

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

    def draw(self, drawing: Drawing) -> list[Drawn]:
        """What each rank drew, in rank order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        print(json.dumps({"folder": str(folder), "drawing": asdict(drawing)}), file=self._process.stdin)
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        assert answer == "done", (folder / "error").read_text() if (folder / "error").exists() else answer
        num_ranks = parse_layout(drawing.layout).world_size
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]

    def close(self) -> None:
        """End the process; its ranks have ended before."""
        self._process.communicate()
        assert self._process.returncode == 0


def denoise_together(
    model: HiDreamModel, requests: Sequence[dict[str, Any]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Draw requests in one batch, each entering one step after the one before it.

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
        running = [state for state in running if not state.is_denoised]
    assert first_prediction is not None
    return first_prediction, [state.latents for state in states]


def _draw(drawing: dict[str, Any], rank: int, store_port: int) -> Drawn:
    layout = parse_layout(drawing["layout"])
    groups = ParallelGroups(layout, rank)
    device = CpuDevice()
    device.dtype = getattr(torch, drawing["dtype"])  # type: ignore[misc]
    model = HiDreamModel.from_pretrained(Path(drawing["checkpoint"]), None, device, groups)
    command = JoinGroup(
        generation=1,
        world_size=layout.world_size,
        store_port=store_port,
        init_timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
        collective_timeout_seconds=COLLECTIVE_TIMEOUT_SECONDS,
    )
    join_group(command, groups, rank, device.backend, device.torch_device)
    drawn = Drawn()
    _watch_collectives(drawn, drawing["left_out"])
    for case in drawing["cases"]:
        prediction, latents = denoise_together(model, case["requests"])
        drawn.first_predictions[case["name"]] = prediction.clone()
        drawn.latents[case["name"]] = [x.clone() for x in latents]
    leave_group(groups)
    return drawn


def _watch_collectives(drawn: Drawn, left_out: list[Any] | None) -> None:
    """Note where the layers' collectives are called, and leave one out."""

    def watched(name: str, without: Any) -> None:
        original = getattr(Axis, name)

        def call(axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
            caller = sys._getframe(1)
            # An axis may use one collective to do another: what counts is who asked for it.
            while caller.f_back is not None and Path(caller.f_code.co_filename).name == "groups.py":
                caller = caller.f_back
            site = Path(caller.f_code.co_filename).name, caller.f_lineno
            if axis.size > 1 and site not in drawn.collectives:
                drawn.collectives.append(site)
            if left_out is not None and site == tuple(left_out):
                result: torch.Tensor = without(axis, tensor)
            else:
                result = original(axis, tensor)
            return result

        setattr(Axis, name, call)

    watched("all_reduce", lambda axis, tensor: tensor)
    watched("all_gather", lambda axis, tensor: tensor.expand(axis.size, *tensor.shape))
    watched("reduce_scatter", lambda axis, tensor: tensor[axis.index])


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
    folder, drawing = Path(task["folder"]), task["drawing"]
    num_ranks = parse_layout(drawing["layout"]).world_size
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store_port = listener.getsockname()[1]
        store_pid = _fork(lambda: host_store(listener))

    def be_rank(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                torch.save(_draw(drawing, rank, store_port), folder / f"{rank}.pt")
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
