"""Real ranks on gloo that encode prompts: each saves what it saw at every stage, for the test to compare.

python -m tests.numerics.prompt_ranks CHECKPOINT LAYOUT(json) FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.engine.protocol.messages import JoinGroup, StepPlan
from hidream_grpc.engine.protocol.processes import die_with_parent
from hidream_grpc.engine.rank.process_group import join_group, leave_group
from hidream_grpc.engine.rank.runner import Runner
from hidream_grpc.engine.zygote.store_host import host_store
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.groups import ParallelGroups
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.prompts.encoding import EMPTY_PROMPT
from hidream_grpc.model.prompts.text_encoders import TextEncoder, TextEncoders
from hidream_grpc.model.transformer.conditioning import Conditioning
from tests.support.denoising import parameters
from tests.support.rank_groups import admission

TIMEOUT_SECONDS = 60.0

LONG = 192
CIRCLE, BROKEN = PaddedPrompt("a red circle"), PaddedPrompt("broken")
SQUARE, STAR = PaddedPrompt("a blue square", LONG), PaddedPrompt("a star", LONG)
PROMPTS = (CIRCLE, EMPTY_PROMPT, SQUARE, CIRCLE)


@dataclass(frozen=True)
class Seen:
    """What one rank has of some prompts.

    conditionings: pooled, t5 and llama of each prompt.
    errors: prompts that failed on this rank.
    runs: own encoders that ran, with the prompt.
    """

    conditionings: dict[PaddedPrompt, tuple[Tensor, ...]]
    errors: tuple[PaddedPrompt, ...]
    num_cache_hits: int
    num_cache_misses: int
    runs: tuple[tuple[str, PaddedPrompt], ...]


@dataclass(frozen=True)
class Planned:
    """What one rank answered to a plan that admits a broken and a whole job and steps both."""

    faults: tuple[tuple[str, str], ...]
    steps: dict[str, int]
    num_prompt_cache_hits: int
    num_prompt_cache_misses: int


class _Recorded:
    """An encoder that notes what it runs for, and breaks on demand."""

    def __init__(
        self,
        name: TextEncoderName,
        encoder: TextEncoder,
        runs: list[tuple[str, PaddedPrompt]],
        breaks: bool,
    ) -> None:
        self._name, self._encoder, self._runs, self._breaks = name, encoder, runs, breaks

    def encode(self, prompt: PaddedPrompt) -> Tensor:
        self._runs.append((self._name.value, prompt))
        if self._breaks and BROKEN.text in prompt.text:
            raise RuntimeError("this encoder is broken")
        return self._encoder.encode(prompt)


class Rank:
    """One rank through all stages."""

    def __init__(self, checkpoint: Path, layout: Layout, rank: int, store_port: int) -> None:
        self.groups = ParallelGroups(layout, rank)
        self.device = CpuDevice()
        self._checkpoint = checkpoint
        self._rank = rank
        self._store_port = store_port
        self._generation = 0
        self.load()

    def load(self) -> None:
        """Load the model, as a new rank does."""
        self.model = HiDreamModel.from_pretrained(self._checkpoint, None, self.device, self.groups)
        self.runs: list[tuple[str, PaddedPrompt]] = []
        encoders: TextEncoders = self.model._prompt_encoder._text_encoders
        encoders._own = {
            name: _Recorded(name, encoder, self.runs, breaks=name is TextEncoderName.T5)
            for name, encoder in encoders._own.items()
        }

    def join(self) -> None:
        self._generation += 1
        command = JoinGroup(
            generation=self._generation,
            world_size=self.groups.layout.world_size,
            store_port=self._store_port,
            init_timeout_seconds=TIMEOUT_SECONDS,
            collective_timeout_seconds=TIMEOUT_SECONDS,
        )
        join_group(command, self.groups, self._rank, self.device.backend, self.device.torch_device)

    def encode(self, prompts: Sequence[PaddedPrompt]) -> Seen:
        self.runs.clear()
        encoded = self.model.encode(prompts)
        return Seen(
            {prompt: _tensors(conditioning) for prompt, conditioning in encoded.conditionings.items()},
            tuple(encoded.errors),
            encoded.num_cache_hits,
            encoded.num_cache_misses,
            tuple(self.runs),
        )

    def run_plan(self) -> Planned:
        """Admit a job with a broken prompt, one with a broken negative prompt and a whole one."""
        runner = Runner(self.model, self.device, self.groups.world, ImageMetadata())
        jobs = {
            "broken": parameters(f"{BROKEN.text} for good"),
            "half broken": parameters(SQUARE.text, negative_prompt=f"{BROKEN.text} too", prompt_tokens=LONG),
            "whole": parameters(STAR.text, negative_prompt=SQUARE.text, prompt_tokens=LONG),
        }
        done = runner.run(
            StepPlan(
                plan_id=1,
                admissions=tuple(admission(job_id, request) for job_id, request in jobs.items()),
                step_claims=tuple(jobs),
            )
        )
        return Planned(
            tuple((fault.claim_id, fault.kind) for fault in done.faults),
            {job_id: job.state.step for job_id, job in runner._requests.items()},
            done.num_prompt_cache_hits,
            done.num_prompt_cache_misses,
        )

    def stages(self) -> Iterator[tuple[str, Seen | Planned]]:
        self.join()
        yield "first", self.encode(PROMPTS)
        yield "again", self.encode(PROMPTS)
        yield "broken", self.encode([BROKEN, STAR])
        yield "planned", self.run_plan()
        leave_group(self.groups)
        if self._rank == self.groups.world.size - 1:
            self.load()
        self.join()
        yield "after a replacement", self.encode([CIRCLE, SQUARE])
        yield "after it again", self.encode([SQUARE, CIRCLE])
        leave_group(self.groups)


def _tensors(conditioning: Conditioning) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in (conditioning.pooled, conditioning.t5, conditioning.llama))


@contextmanager
def _store() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        pid = _fork(lambda: host_store(listener))
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _fork(child: Callable[[], None]) -> int:
    if pid := os.fork():
        return pid
    exit_code = 1
    try:
        die_with_parent(os.getppid())
        child()
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(exit_code)


def _run(checkpoint: Path, layout: Layout, folder: Path) -> bool:
    """Run the ranks of one layout; whether all of them got to their end."""

    def be(rank: int, store_port: int) -> None:
        with torch.inference_mode():
            stages = dict(Rank(checkpoint, layout, rank, store_port).stages())
            torch.save(stages, folder / f"{rank}.pt")

    with _store() as store_port:
        pids = [_fork(partial(be, rank, store_port)) for rank in range(layout.world_size)]
        exit_codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return not any(exit_codes)


def main() -> None:
    """Run one layout after the other; exits with 1 when a rank failed."""
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for index, layout in enumerate(json.loads(sys.argv[3])):
        (folder / str(index)).mkdir()
        if not _run(checkpoint, Layout(**layout), folder / str(index)):
            sys.exit(1)


if __name__ == "__main__":
    # What ranks save names its classes by the module's own name, not as __main__.
    from tests.numerics import prompt_ranks

    prompt_ranks.main()
