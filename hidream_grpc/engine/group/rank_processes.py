"""The processes of a rank group: the zygote, its store and its ranks."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.engine.group.config import GroupConfig
from hidream_grpc.engine.group.hang_detection import HangDetector
from hidream_grpc.engine.group.listener import RankListener
from hidream_grpc.engine.group.memory_gate import MemoryGate
from hidream_grpc.engine.group.placement import Placement
from hidream_grpc.engine.group.plan_execution import CAUSE_PRECEDENCE, watch_ranks
from hidream_grpc.engine.group.rank_link import RankLink
from hidream_grpc.engine.group.zygote_link import ChildProcess, ZygoteLink
from hidream_grpc.engine.protocol.messages import JoinGroup, Load, PrepareZygote
from hidream_grpc.errors import DeviceFailedError, InsufficientMemoryError, RankDiedError, StartupError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class CannotJoinError(RankDiedError):
    """Some ranks could not join; which one caused that is not known yet."""


class RankProcesses:
    """Starts the processes that are missing, and has all ranks join a generation.

    Args:
        config: the configuration of the group.

    Attributes:
        zygote: the current zygote; None before the first.
        store: the current store host; None before the first.
        generation: number of the newest torch.distributed group; 0 before the first.
        loss: an event that is set when a process ends that was not asked to.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.zygote: ZygoteLink | None = None
        self.store: ChildProcess | None = None
        self.generation = 0
        self.loss = asyncio.Event()
        self._config = config
        self._listener = RankListener()
        self._ranks: dict[int, RankLink] = {}

    @property
    def ranks(self) -> tuple[RankLink, ...]:
        """The ranks that have loaded, in rank order."""
        return tuple(self._ranks[rank] for rank in sorted(self._ranks))

    async def listen(self) -> None:
        """Start to accept connections of ranks; raise ConfigurationError where that is impossible."""
        await self._listener.start()

    async def start_missing(
        self, placement: Placement, check_memory: Callable[[Mapping[int, DeviceMemory]], None]
    ) -> None:
        """Start what is missing, and replace what is lost; `loss` is set for later losses only.

        Args:
            placement: the layout of the ranks, and their devices.
            check_memory: raises InsufficientMemoryError, given the devices of the ranks that start.

        Raises:
            DeviceFailedError: devices cannot be opened or loaded onto.
            InsufficientMemoryError: there is no room for what the ranks load.
            StartupError: the ranks cannot load, whatever the device.
            RankDiedError: a process was killed meanwhile.
        """
        zygote = await self._living_zygote(placement)
        if self.store is None or self.store.exited.done():
            self.store = await zygote.start_store()
            self.store.exited.add_done_callback(lambda _exit_code: self.loss.set())
        replace_all = self._config.replace == "all"
        for rank in self.ranks:
            if replace_all or rank.loss is not None or rank.child.exited.done():
                del self._ranks[rank.rank]
                await rank.end()
        # No await between the loop above and this: a loss after it must set the event.
        self.loss.clear()
        missing = sorted(set(range(placement.layout.world_size)) - set(self._ranks))
        gate = MemoryGate(missing, check_memory)
        starting = (self._start_rank(rank, placement, zygote, gate) for rank in missing)
        failures = list(filter(None, await _all_of(starting)))
        if of_devices := [failure for failure in failures if isinstance(failure, DeviceFailedError)]:
            raise DeviceFailedError(
                tuple(rank for failure in of_devices for rank in failure.ranks),
                of_devices[0].reason,
                took_too_long=any(failure.took_too_long for failure in of_devices),
            )
        for failure in failures:
            raise failure

    async def join_next_generation(self, limit_seconds: float) -> None:
        """Have all ranks join a new torch.distributed group.

        Args:
            limit_seconds: how long a rank that has worked may be idle, or compute, before it joins.

        Raises:
            RankDiedError: a rank is gone already.
            CannotJoinError: some ranks could not join.
        """
        if self.store is None:
            raise ValueError("the store must be started first")
        if (loss := self.find_loss()) is not None:
            raise loss
        self.generation += 1
        timeouts = self._config.timeouts
        command = JoinGroup(
            generation=self.generation,
            world_size=len(self._ranks),
            store_port=self.store.store_port,
            init_timeout_seconds=timeouts.init_seconds,
            collective_timeout_seconds=timeouts.collective_seconds,
        )
        joining = {
            rank: asyncio.create_task(rank.join(command, timeouts.join_seconds)) for rank in self.ranks
        }
        # New ranks are not watched: they warm up.
        survivors = {rank: task for rank, task in joining.items() if rank.has_worked}
        detector = HangDetector(limit_seconds, self._config.threads_per_rank, may_all_wait=True)
        watching = asyncio.create_task(watch_ranks(survivors, detector))
        try:
            # Wait for every answer, so that all survivors are ready for the next try.
            outcomes = await asyncio.gather(*joining.values(), return_exceptions=True)
        finally:
            watching.cancel()
        for failure in filter(None, outcomes):
            if isinstance(failure, RankDiedError):
                raise CannotJoinError(failure.ranks, failure.reason)
            raise failure

    async def end_ranks(self) -> None:
        """Ask all ranks to leave, and kill those that do not."""
        ranks, self._ranks = self.ranks, {}
        await asyncio.gather(*(rank.end(self._config.timeouts.leave_seconds) for rank in ranks))

    async def stop(self) -> None:
        """End everything, and wait until no process is left; may be called twice."""
        await self.end_ranks()
        if self.zygote is not None:
            await self.zygote.stop()
        await self._listener.stop()

    def find_loss(self) -> RankDiedError | None:
        """The loss of a process, with its cause; None when no process is known to be gone."""
        if self.zygote is not None and self.zygote.lost.is_set():
            ranks = tuple(rank.rank for rank in self.ranks)
            return RankDiedError(ranks, f"their zygote was lost: {self.zygote.loss}")
        if dead := [rank for rank in self.ranks if rank.loss is not None]:
            reasons = sorted({rank.loss for rank in dead if rank.loss is not None})
            cause = min((rank.loss_cause for rank in dead), key=CAUSE_PRECEDENCE.index)
            return RankDiedError(tuple(rank.rank for rank in dead), ", ".join(reasons), cause)
        if self.store is not None and self.store.exited.done():
            return RankDiedError((), f"the store was lost: {self.store.end}")
        return None

    async def _living_zygote(self, placement: Placement) -> ZygoteLink:
        prepare = PrepareZygote(
            start_method=self._config.start_method,
            environment=placement.devices.environment(os.environ),
            socket_path=self._listener.socket_path,
            log=self._config.log,
        )
        if self.zygote is not None and self.zygote.prepare != prepare:
            # Its children would see other devices than these.
            await self.zygote.stop()
        if self.zygote is None or self.zygote.lost.is_set():
            self.zygote = await ZygoteLink.start(prepare, self._config.timeouts.load_seconds)
        return self.zygote

    async def _start_rank(
        self, rank: int, placement: Placement, zygote: ZygoteLink, gate: MemoryGate
    ) -> RankDiedError | DeviceFailedError | InsufficientMemoryError | None:
        """Start one rank; return a failure instead of raising it, so that the other ranks go on loading."""

        def make_load(counter_path: Path) -> Load:
            return Load(
                model_path=self._config.model_path,
                extra_model_path=self._config.extra_model_path,
                checkpoint_fingerprint=self._config.checkpoint_fingerprint,
                weights=self._config.weights,
                layout=placement.layout,
                device_type=placement.devices.device_type.name,
                local_index=placement.devices.local_index(rank),
                num_threads=self._config.threads_per_rank,
                compile_shapes=self._config.compile_shapes,
                image_metadata=self._config.image_metadata,
                counter_path=counter_path,
                log=self._config.log,
                reserve_bytes=self._config.reserve_bytes(placement.layout),
            )

        load_seconds = self._config.timeouts.load_seconds
        try:
            link = await RankLink.start(
                rank, make_load, partial(gate.pass_through, rank), load_seconds, self._listener, zygote
            )
        except (RankDiedError, DeviceFailedError, InsufficientMemoryError) as failure:
            return failure
        finally:
            gate.leave(rank)
        self._ranks[rank] = link
        logger.info("rank %d is process %d", rank, link.child.pid)
        link.watch(self.loss.set)
        return None


async def _all_of(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all concurrently; the first failure cancels the others and is raised, further ones are logged."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        first, *others = failures.exceptions
        for failure in others:
            is_explained = isinstance(failure, StartupError)
            logger.error("starting a rank failed: %s", failure, exc_info=None if is_explained else failure)
    else:
        return [task.result() for task in running]
    raise first
