"""The process of a rank: opens its device, loads its weights once, then executes the server's commands.

    connect → Hello → Load → DeviceOpened → LoadWeights → Loaded
            → { JoinGroup → Joined | StepPlan → PlanDone | GiveSnapshot → SnapshotGiven }* → Leave

When the group breaks, the rank answers with GroupBroken and waits for the next JoinGroup with its weights in
place. The states of its requests stay too, until the first plan of the next generation: new ranks do not have
them, so all ranks go on from the snapshots of one survivor. An idle rank blocks in a read of its socket.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import torch
from setproctitle import setproctitle

from hidream_grpc.devices.device import Device, open_device
from hidream_grpc.devices.faults import is_device_fault, is_out_of_memory
from hidream_grpc.engine.protocol.channel import BlockingChannel
from hidream_grpc.engine.protocol.collective_counter import CollectiveCounterWriter
from hidream_grpc.engine.protocol.messages import (
    Command,
    DeviceFacts,
    DeviceOpened,
    GiveSnapshot,
    GroupBroken,
    Hello,
    Joined,
    JoinGroup,
    Load,
    Loaded,
    LoadFailed,
    LoadWeights,
    ModelFacts,
    PlanDone,
    SnapshotGiven,
    StepPlan,
)
from hidream_grpc.engine.protocol.processes import die_with_parent, leave_signals_to_the_server
from hidream_grpc.engine.rank.process_group import join_group, leave_group
from hidream_grpc.engine.rank.runner import Runner
from hidream_grpc.errors import HiDreamError, JobInternalError, LossCause
from hidream_grpc.logs import NOT_ON_TERMINAL, configure_logging
from hidream_grpc.model.checkpoint.files import MODEL_PATH_FLAG
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.loading import summary_of
from hidream_grpc.model.parallel.groups import CollectiveError, ParallelGroups
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.prompts.encoding import EMPTY_PROMPT

# By name, since this module is __main__ where the zygote execs.
logger = logging.getLogger("hidream_grpc.engine.rank.worker")


class RankContext(logging.Filter):
    """Adds the rank and its generation to every line that this process logs, also those of libraries."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank
        self.generation = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields to a record, and keep every record."""
        record.rank = self._rank
        record.generation = self.generation
        return True


class Worker:
    """A rank that has loaded its weights.

    Args:
        channel: connection to the server.
        rank: index of the rank in every generation's group.
        device, model, groups: what this rank works with until the process ends.
        image_metadata: what the files of images say of themselves.
        context: adds the generation to its log lines.
    """

    def __init__(
        self,
        channel: BlockingChannel[Command],
        rank: int,
        device: Device,
        model: HiDreamModel,
        groups: ParallelGroups,
        image_metadata: ImageMetadata,
        context: RankContext,
    ) -> None:
        self._channel = channel
        self._rank = rank
        self._device = device
        self._model = model
        self._groups = groups
        self._image_metadata = image_metadata
        self._context = context
        self._runner: Runner | None = None
        # The runner of the lost generation, until the first plan of the next one.
        self._lost_runner: Runner | None = None

    def serve(self) -> None:
        """Execute commands until `Leave`, or until the server is gone."""
        while True:
            command = self._channel.receive()
            match command:
                case JoinGroup() | StepPlan():
                    self._channel.send(self._answer(command))
                case GiveSnapshot():
                    self._channel.send(self._give_snapshot(command))
                case _:
                    break
        leave_group(self._groups)

    def _answer(self, command: JoinGroup | StepPlan) -> Joined | PlanDone | GroupBroken:
        try:
            return self._join(command) if isinstance(command, JoinGroup) else self._run(command)
        except CollectiveError as error:
            logger.warning("leaving the group: %s", error)
            reason, cause = "its group was lost", LossCause.OUTSIDE
            if error.__cause__ is not None and self._device.is_out_of_memory(error.__cause__):
                reason, cause = "no memory for an exchange", LossCause.OUT_OF_MEMORY
        except Exception as error:
            # Work shared by all requests failed: leaving makes the collective of the others fail at once.
            internal_error = JobInternalError.new()
            logger.exception("leaving the group", extra={"error_id": internal_error.error_id})
            reason, cause = str(internal_error), LossCause.FAULT
            if self._device.is_out_of_memory(error):
                reason, cause = f"no memory for a step ({reason})", LossCause.OUT_OF_MEMORY
        # Not in an except block, whose traceback would keep the sockets of the group open.
        self._leave()
        if cause is LossCause.OUT_OF_MEMORY:
            self._device.empty_cache()
        return GroupBroken(generation=self._context.generation, reason=reason, cause=cause)

    def _leave(self) -> None:
        if self._runner is not None:
            self._runner.give_up()
            # A runner that ran no plan has no states; the runner before it still has them.
            self._lost_runner = self._lost_runner or self._runner
            self._runner = None
        leave_group(self._groups)

    def _join(self, command: JoinGroup) -> Joined:
        self._leave()
        self._context.generation = command.generation
        join_group(command, self._groups, self._rank, self._device.backend, self._device.torch_device)
        self._runner = Runner(self._model, self._device, self._groups.world, self._image_metadata)
        # Guidance always needs it, and a new rank has not encoded it.
        self._model.encode([EMPTY_PROMPT])
        return Joined(generation=command.generation)

    def _run(self, plan: StepPlan) -> PlanDone:
        if self._runner is None:
            raise CollectiveError("a plan came before this rank joined the new group")
        self._lost_runner = None
        return self._runner.run(plan)

    def _give_snapshot(self, command: GiveSnapshot) -> SnapshotGiven:
        runner = self._lost_runner or self._runner
        data = runner.snapshot(command.claim_id, command.step) if runner else b""
        return SnapshotGiven(claim_id=command.claim_id, step=command.step, data=data)


def work(socket_path: Path, rank: int) -> None:
    """Run a rank until it ends; raise SystemExit when it cannot load."""
    setproctitle(f"hidream-grpc rank {rank}")
    channel = BlockingChannel[Command].connect(socket_path, Command)
    try:
        channel.send(Hello(rank=rank, pid=os.getpid()))
        load = channel.receive()
        if isinstance(load, Load):
            _load_and_serve(channel, rank, load)
    except ConnectionError:
        logger.info("the server is gone")


def _load_and_serve(channel: BlockingChannel[Command], rank: int, load: Load) -> None:
    configure_logging(load.log, may_start_threads=True)
    context = RankContext(rank)
    for handler in logging.getLogger().handlers:
        handler.addFilter(context)
    # The zygote has imported torch with one thread.
    torch.set_num_threads(load.num_threads)
    # No gradients anywhere in a rank: what is computed here is never differentiated.
    with torch.inference_mode():
        device: Device | None = None
        work = f"{MODEL_PATH_FLAG}: {load.model_path}: cannot be loaded"
        try:
            device = open_device(load.device_type, load.local_index)
            channel.send(DeviceOpened(device=_facts_of(device)))
            if not isinstance(channel.receive(), LoadWeights):
                return
            started = time.monotonic()
            groups = ParallelGroups(load.layout, rank, CollectiveCounterWriter(load.counter_path))
            model = HiDreamModel.from_pretrained(
                load.model_path,
                load.extra_model_path,
                device,
                groups,
                load.checkpoint_fingerprint,
                load.weights,
                load.reserve_bytes,
            )
            if load.compile_shapes:
                work = "--compile-shapes: the transformer cannot be compiled"
                model.compile(load.compile_shapes)
        except ConnectionError:
            raise
        except HiDreamError as error:
            channel.send(LoadFailed(reason=str(error)))
            sys.exit(1)
        except Exception as error:
            logger.exception("cannot load the model from %s", load.model_path, extra=NOT_ON_TERMINAL)
            channel.send(_load_failed(error, device, rank, work))
            sys.exit(1)
        load_seconds = time.monotonic() - started
        logger.info("loaded in %.3f s", load_seconds)
        channel.send(_loaded(device, model, load_seconds))
        Worker(channel, rank, device, model, groups, load.image_metadata, context).serve()


def _load_failed(error: Exception, device: Device | None, rank: int, work: str) -> LoadFailed:
    """The report of an unexpected error that ends a rank.

    Args:
        error: the error.
        device: device of the rank; None where opening it failed.
        rank: index of the rank.
        work: what failed, in words, if the device did not.
    """
    summary = summary_of(error)
    if device is None:
        return LoadFailed(
            reason=f"rank {rank} cannot load: {summary}",
            # Runtimes raise these; a runtime that is not installed raises ImportError.
            is_device=isinstance(error, RuntimeError | MemoryError),
            # A runtime that found no room to open its device says so in words.
            is_out_of_memory=isinstance(error, MemoryError) or "out of memory" in str(error),
        )
    if is_device_fault(error, device):
        return LoadFailed(
            reason=f"rank {rank} cannot load: {summary}",
            is_device=True,
            is_out_of_memory=is_out_of_memory(error, device),
        )
    return LoadFailed(reason=f"{work}: {summary}")


def _loaded(device: Device, model: HiDreamModel, load_seconds: float) -> Loaded:
    return Loaded(
        load_seconds=load_seconds,
        model=ModelFacts(
            scheduler_name=model.scheduler_name, shift=model.shift, num_parameters=model.num_parameters
        ),
        device=_facts_of(device),
    )


def _facts_of(device: Device) -> DeviceFacts:
    memory = device.memory()
    return DeviceFacts(
        name=device.name, total_memory_bytes=memory.total_bytes, free_memory_bytes=memory.free_bytes
    )


def main() -> None:
    """Entry point where the zygote execs; arguments: path of the socket, rank, pid of the zygote."""
    socket_path, rank, parent_pid = sys.argv[1:]
    die_with_parent(int(parent_pid))
    leave_signals_to_the_server()
    work(Path(socket_path), int(rank))


if __name__ == "__main__":
    main()
