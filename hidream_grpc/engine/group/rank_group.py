"""Keeps a group of ranks alive: starts it, runs plans on it, replaces dead ranks, ends it.

    start ─→ generation 1 ─ execute ─ execute ─ … ─→ RankDiedError ─→ recover ─→ generation 2 ─ …

A generation is one torch.distributed group. When a rank dies, only its process is started again; the
survivors keep their weights and join the next generation together with the new one. When a device stays
broken, the group goes on with the others, in a smaller layout if necessary.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.devices.host_memory import host_memory
from hidream_grpc.engine.group.config import GroupConfig
from hidream_grpc.engine.group.hang_detection import HangDetector
from hidream_grpc.engine.group.placement import GroupPlacement, Placement
from hidream_grpc.engine.group.plan_execution import run_plan, wait_for_death_report
from hidream_grpc.engine.group.plan_timeouts import PlanTimeouts
from hidream_grpc.engine.group.rank_processes import CannotJoinError, RankProcesses
from hidream_grpc.engine.protocol.messages import Loaded, PlanDone, StepPlan
from hidream_grpc.errors import (
    DeviceFailedError,
    InsufficientMemoryError,
    LossCause,
    RankDiedError,
    RestartRequestedError,
    StartupError,
)
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.weight_format import WeightFormats

logger = logging.getLogger(__name__)

MAX_RECOVERY_TRIES = 5
DEVICE_PAUSE_SECONDS = 0.5
"""Pause before a device is opened again: its driver may still be cleaning up after the previous process."""

SNAPSHOT_SECONDS = 30.0
"""How long to wait for a snapshot of one rank; copying its few megabytes takes milliseconds."""


async def _keep_nothing() -> None:
    """Keep no snapshot: there is no running request."""


class RankGroup:
    """N ranks, their zygote and their store, as one unit that works or is lost.

    Call its methods in the main thread's event loop, one at a time except for `wait_for_loss` and
    `ask_for_full_layout`. After a RankDiedError call `recover`; `stop` may be called at any time, and more
    than once.

    Attributes:
        num_restarts: number of rank processes that were started in place of another one.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.num_restarts = 0
        self._config = config
        self._placement = GroupPlacement(config.devices, config.layout, config.smaller_layouts)
        self._layout_instead: Layout | None = None
        self._plan_timeouts = PlanTimeouts(
            config.timeouts.min_plan_seconds, config.timeouts.collective_seconds
        )
        self._processes = RankProcesses(config)
        self._full_layout_wanted = False

    @property
    def placement(self) -> Placement:
        """The current layout of the ranks, and their devices."""
        return self._placement.now

    @property
    def checkpoint_fingerprint(self) -> str:
        """Fingerprint of the checkpoint; a rank that finds another one does not load."""
        return self._config.checkpoint_fingerprint

    @property
    def weights(self) -> WeightFormats:
        """The formats in which the ranks hold the weights."""
        return self._config.weights

    @property
    def full_layout(self) -> Layout:
        """The layout that the operator requested."""
        return self._placement.full_layout

    @property
    def world_size(self) -> int:
        """Number of ranks of the group, dead ones included."""
        return self.placement.layout.world_size

    @property
    def generation(self) -> int:
        """Number of the current torch.distributed group; 0 before `start`."""
        return self._processes.generation

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """What each rank reported about its model and device, in rank order."""
        return tuple(rank.loaded for rank in self._processes.ranks if rank.loaded is not None)

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Process ids in rank order."""
        return tuple(rank.child.pid for rank in self._processes.ranks)

    async def start(self) -> None:
        """Start everything and join generation 1. No process is left when it fails.

        Raises:
            StartupError: the ranks cannot load, or the zygote cannot import.
            RankDiedError: ranks kept dying.
        """
        try:
            await self._processes.listen()
            await self._bring_up(_keep_nothing)
        except BaseException:
            await self.stop()
            raise

    async def execute(self, plan: StepPlan) -> tuple[PlanDone, ...]:
        """Run a plan on all ranks.

        Returns:
            The answers of the ranks, in rank order.

        Raises:
            RankDiedError: a rank died, hung or left the group; `recover` before the next plan.
        """
        if self._processes.loss.is_set():
            raise self._loss_error()
        started = time.monotonic()
        detector = HangDetector(self._plan_timeouts.start(plan), self._config.threads_per_rank)
        try:
            answers = await run_plan(self._processes.ranks, plan, detector, self._processes.loss)
        except RankDiedError as failure:
            raise self._processes.find_loss() or failure from None
        self._plan_timeouts.done(answers, time.monotonic() - started)
        return answers

    async def snapshot_of(self, claim_id: str, step: int) -> bytes | None:
        """A snapshot of a request after a step, from the lowest rank that has it; None when none has.

        After `recover` and until the next plan, the ranks that kept their processes have the requests of the
        lost plan, both as they were before it and after it. A rank that does not answer in time is killed, so
        that the next call finds it dead: no rank is waited for twice.

        Raises:
            RankDiedError: a rank died; `recover` before the next plan.
        """
        for rank in self._processes.ranks:
            try:
                async with asyncio.timeout(SNAPSHOT_SECONDS):
                    if data := await rank.snapshot_of(claim_id, step):
                        return data
            except TimeoutError:
                # It would also hold up the next request, and the first plan.
                await rank.kill_hung(f"gives no snapshot within {SNAPSHOT_SECONDS:g} s", LossCause.OUTSIDE)
        return None

    async def wait_for_loss(self) -> RankDiedError:
        """Wait until a process of the group dies; returns at once while one is dead."""
        await self._processes.loss.wait()
        return self._loss_error()

    def ask_for_full_layout(self) -> bool:
        """Request the return to the full layout, with all devices counted as working again.

        `execute` and `wait_for_loss` then end in RestartRequestedError, and `recover` makes the change.

        Returns:
            Whether the layout is not the full one already.
        """
        if self._placement.is_full:
            return False
        self._full_layout_wanted = True
        self._processes.loss.set()
        return True

    async def recover(self, keep_snapshots: Callable[[], Awaitable[None]] = _keep_nothing) -> tuple[int, ...]:
        """Replace dead ranks and join the next generation, in which no rank knows a request.

        Args:
            keep_snapshots: called before survivors are ended, where the layout changes: the last moment for
                `snapshot_of`.

        Returns:
            The ranks whose processes are new.

        Raises:
            RankDiedError: the group did not recover. It may be called again.
        """
        before = set(self.rank_pids)
        try:
            await self._bring_up(keep_snapshots)
        except (StartupError, OSError) as error:
            # OSError: the system has no free process, memory or file descriptor now.
            there = {rank.rank for rank in self._processes.ranks}
            raise RankDiedError(tuple(set(range(self.world_size)) - there), str(error)) from error
        replaced = tuple(rank for rank, pid in enumerate(self.rank_pids) if pid not in before)
        self.num_restarts += len(replaced)
        return replaced

    async def stop(self) -> None:
        """Ask the ranks to leave, kill those that do not, and wait until no process is left."""
        await self._processes.stop()

    # --- from a lost group, or none, to one that works ----------------------------------------------

    async def _bring_up(self, keep_snapshots: Callable[[], Awaitable[None]]) -> None:
        """Bring up a group on as many devices as work."""
        if self._full_layout_wanted:
            await self._end_ranks(keep_snapshots)
            self._placement.reset()
        self._full_layout_wanted = False
        why = ""
        while True:
            try:
                await self._bring_up_here()
            except DeviceFailedError as failure:
                await self._end_ranks(keep_snapshots)
                if not self._placement.without(failure.ranks):
                    raise
                why = failure.reason
            except InsufficientMemoryError as failure:
                if not why:
                    # What was chosen without knowing the memory gives way, what the operator named does not.
                    if self._layout_instead is None:
                        raise
                    self._placement.request(self._layout_instead)
                    logger.warning("layout %s instead: %s", self.placement.layout, failure)
                    await self._end_ranks(keep_snapshots)
                    continue
                await self._end_ranks(keep_snapshots)
                if not self._placement.later():
                    raise InsufficientMemoryError(f"{why}; without it, {failure}") from None
                logger.error("layout passed over: %s", failure)
                continue
            except CannotJoinError as failure:
                await self._end_ranks(keep_snapshots)
                if not self._placement.smaller():
                    raise
                why = failure.reason
            else:
                break
            idle = ", ".join(str(device) for device in self.placement.devices.idle_devices)
            logger.error("layout %s from now on, without devices %s: %s", self.placement.layout, idle, why)
        if self._full_layout_wanted:
            self._processes.loss.set()

    async def _end_ranks(self, keep_snapshots: Callable[[], Awaitable[None]]) -> None:
        """End all ranks, whose weights are those of the old layout."""
        if self._processes.ranks:
            with suppress(TimeoutError):
                async with asyncio.timeout(SNAPSHOT_SECONDS):
                    await keep_snapshots()
        await self._processes.end_ranks()

    async def _bring_up_here(self) -> None:
        """Start what is missing and join a new generation; retry when ranks fail meanwhile."""
        loss = self._processes.loss
        were_lost = False
        for tries_left in reversed(range(MAX_RECOVERY_TRIES)):
            try:
                await self._processes.start_missing(self.placement, self._check_memory)
                await self._processes.join_next_generation(self._plan_timeouts.longest_seconds)
            except DeviceFailedError as error:
                if tries_left == 0 or error.took_too_long:
                    raise
                logger.warning("trying again: %s", error)
                await asyncio.sleep(DEVICE_PAUSE_SECONDS)
            except InsufficientMemoryError as error:
                # Memory of a killed process, of this server or an earlier one, may not be free yet.
                if tries_left == 0 or (self.generation == 0 and not error.fits_total):
                    raise
                logger.warning("trying again: %s", error)
                await asyncio.sleep(DEVICE_PAUSE_SECONDS)
            except CannotJoinError as error:
                await wait_for_death_report(loss)
                were_lost = were_lost or loss.is_set()
                if tries_left == 0:
                    raise RankDiedError(error.ranks, error.reason) if were_lost else error from None
                logger.warning("joining again: %s", error)
            except RankDiedError as error:
                were_lost = True
                if tries_left == 0:
                    raise
                logger.warning("starting again what died: %s", error)
            else:
                break
        self._plan_timeouts.next_generation()
        logger.info(
            "%d ranks joined generation %d, layout %s",
            *(self.world_size, self.generation, self.placement.layout),
        )

    def _check_memory(self, devices: Mapping[int, DeviceMemory]) -> None:
        """Raise InsufficientMemoryError where ranks that start have no room, or another layout is chosen."""
        layout, host = self.placement.layout, host_memory()
        self._layout_instead = None
        if self.generation == 0 and not self._placement.has_lost_devices:
            self._choose_again(layout, devices, host)
        if warning := self._config.check_memory(layout, devices, host):
            logger.warning("little memory: %s", warning)

    def _choose_again(self, layout: Layout, devices: Mapping[int, DeviceMemory], host: DeviceMemory) -> None:
        if (choose := self._config.layout_instead) is None:
            return
        scarce = min(devices, key=lambda rank: devices[rank].free_bytes)
        memory = devices[scarce]
        chosen = choose(layout, memory, host)
        if chosen == layout:
            return
        self._layout_instead = chosen
        empty = DeviceMemory(memory.total_bytes, memory.total_bytes)
        raise InsufficientMemoryError(
            f"{layout} is not what to choose with {memory.free_bytes / 1e9:,.1f} of "
            f"{memory.total_bytes / 1e9:,.1f} GB free on the device of rank {scarce}",
            fits_total=choose(layout, empty, host) == layout,
        )

    def _loss_error(self) -> RankDiedError:
        if (loss := self._processes.find_loss()) is not None:
            return loss
        return RestartRequestedError() if self._full_layout_wanted else RankDiedError((), "lost")
