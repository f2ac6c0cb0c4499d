"""Keeps a group of ranks alive: starts it, hands it plans, replaces who died, ends it. Torch-free.

    start ─→ generation 1 ─ execute ─ execute ─ … ─→ RankDiedError ─→ recover ─→ generation 2 ─ …

A generation is one torch.distributed group. When a rank dies only its process is started again;
the survivors keep their weights and join the next generation together with the new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from hidream_grpc.devices.base import StartMethod
from hidream_grpc.engine.listener import RankListener
from hidream_grpc.engine.messages import JoinGroup, Load, Loaded, PlanDone, PrepareZygote, StepPlan
from hidream_grpc.engine.processes import describe_exit
from hidream_grpc.engine.rank_link import RankLink
from hidream_grpc.engine.zygote_link import ChildProcess, ZygoteLink
from hidream_grpc.errors import LossCause, RankDiedError, StartupError
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.step_shapes import StepShape

logger = logging.getLogger(__name__)

MAX_RECOVERY_TRIES = 5
DEATH_NOTICE_SECONDS = 1.0
"""A survivor may report the broken group before the news of the death that broke it is here."""

SNAPSHOT_SECONDS = 30.0
"""A rank copies a few megabytes from its device in milliseconds; one that takes this long is passed over."""

_BLAME = (LossCause.OUT_OF_MEMORY, LossCause.FAULT, LossCause.OUTSIDE)
"""Of several ranks that left: which one tells why, the first of these."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class GroupTimeouts:
    """How long the ranks may take, in seconds, before they count as dead.

    Attributes:
        load_seconds: from the start of a process to its weights on the device, with whatever it compiles;
            also of the zygote's imports.
        init_seconds: of each step of torch's init. A rank that dies meanwhile holds the others up
            for a few times this.
        join_seconds: from the command to join to the last rank's answer; also covers the work that a
            survivor ends first. Several times init_seconds.
        collective_seconds: of a collective within a plan: how far apart ranks may be.
        leave_seconds: to leave when told to.
    """

    load_seconds: float = 1800.0
    init_seconds: float = 5.0
    join_seconds: float = 120.0
    collective_seconds: float = 600.0
    leave_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """A rank group.

    Attributes:
        model_path: a HiDream-I1 in diffusers format.
        extra_model_path: the Llama folder, where the checkpoint holds none.
        device_type: name of a `devices.base.DeviceType`.
        local_indices: what rank 0, 1, … opens, one for each rank.
        layout: how the ranks share the work.
        environment: set in the ranks before torch is imported.
        start_method: how the zygote makes ranks.
        replace: who is started again when a rank died: the dead alone, or all. "one" is proven on gloo.
        threads_per_rank: of torch, on the CPU.
        compile_shapes: of the steps that each rank compiles for when it has loaded.
        timeouts: of everything that is waited for.
        log: how zygote and ranks log.
    """

    model_path: Path
    extra_model_path: Path | None = None
    device_type: str
    local_indices: tuple[int, ...]
    layout: Layout
    environment: dict[str, str] = field(default_factory=dict)
    start_method: StartMethod = StartMethod.FORK
    replace: Literal["one", "all"] = "one"
    threads_per_rank: int = 1
    compile_shapes: tuple[StepShape, ...] = ()
    timeouts: GroupTimeouts = field(default_factory=GroupTimeouts)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if len(self.local_indices) != self.layout.world_size:
            raise ValueError(f"{len(self.local_indices)} devices for {self.layout.world_size} ranks")


class RankGroup:
    """N ranks, their zygote and their store, as one thing that works or is lost.

    Its methods belong to the main thread's event loop, and but for `wait_for_loss` one is called at a
    time. After a RankDiedError call `recover`; `stop` may be called at any time, and more than once.

    Attributes:
        num_restarts: rank processes that were started in place of another one.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.num_restarts = 0
        self._config = config
        self._listener = RankListener()
        self._zygote: ZygoteLink | None = None
        self._store: ChildProcess | None = None
        self._ranks: dict[int, RankLink] = {}
        self._generation = 0
        self._loss = asyncio.Event()

    @property
    def world_size(self) -> int:
        """Ranks of the group, dead ones included."""
        return self._config.layout.world_size

    @property
    def generation(self) -> int:
        """Number of the current torch.distributed group; 0 before `start`."""
        return self._generation

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """What each rank reported about its model and device, in rank order."""
        return tuple(rank.loaded for rank in self._in_order() if rank.loaded is not None)

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Process ids in rank order."""
        return tuple(rank.child.pid for rank in self._in_order())

    @property
    def zygote_pid(self) -> int | None:
        """Process id of the ranks' parent; None before `start`."""
        return self._zygote.pid if self._zygote else None

    @property
    def store_pid(self) -> int | None:
        """Process id of the TCPStore's host; None before `start`."""
        return self._store.pid if self._store else None

    async def start(self) -> None:
        """Start everything and join generation 1. Nothing is left when it fails.

        Raises:
            StartupError: the ranks cannot load, or the zygote cannot import.
            RankDiedError: ranks kept dying.
        """
        try:
            await self._listener.start()
            await self._bring_up()
        except BaseException:
            await self.stop()
            raise

    async def execute(self, plan: StepPlan) -> tuple[PlanDone, ...]:
        """Have all ranks do their share of a plan.

        Returns:
            Their answers, in rank order.

        Raises:
            RankDiedError: a rank died or left the group; `recover` before the next plan.
        """
        if self._loss.is_set():
            raise self._loss_error()
        running = [asyncio.create_task(rank.run(plan)) for rank in self._in_order()]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_EXCEPTION)
            if not _failures(running):
                return tuple(task.result() for task in running)
            await self._wait_for_blame(running)
        finally:
            for task in running:
                task.cancel()
        if self._loss.is_set():
            raise self._loss_error()
        raise min(_failures(running), key=lambda failure: _BLAME.index(failure.cause))

    async def _wait_for_blame(self, running: list[asyncio.Task[PlanDone]]) -> None:
        """Who only noticed that the group broke may say so before it is known who broke it."""
        loss = asyncio.create_task(self._loss.wait())
        answers = asyncio.create_task(asyncio.wait(running))
        try:
            await asyncio.wait(
                (loss, answers), timeout=DEATH_NOTICE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            loss.cancel()
            answers.cancel()

    async def snapshot_of(self, job_id: str, step: int) -> bytes | None:
        """A request as it was after a step, from the lowest rank that has it so; None when none does.

        After `recover` the ranks that kept their processes have the requests of the plan that was lost, as
        they were before and after it, until the next plan.

        Raises:
            RankDiedError: a rank died; `recover` before the next plan.
        """
        for rank in self._in_order():
            try:
                async with asyncio.timeout(SNAPSHOT_SECONDS):
                    if data := await rank.snapshot_of(job_id, step):
                        return data
            except TimeoutError:
                logger.warning("rank %d gives no snapshot within %g s", rank.rank, SNAPSHOT_SECONDS)
        return None

    async def wait_for_loss(self) -> RankDiedError:
        """Wait until a process of the group dies; returns at once while one is dead."""
        await self._loss.wait()
        return self._loss_error()

    async def recover(self) -> tuple[int, ...]:
        """Replace who died and join the next generation; no rank remembers a request then.

        Returns:
            The ranks whose processes are new.

        Raises:
            RankDiedError: the group did not come back. Calling again tries again.
        """
        before = {rank.rank: rank.child.pid for rank in self._in_order()}
        try:
            await self._bring_up()
        except (StartupError, OSError) as error:
            # OSError: the system has no process, memory or file descriptor to give just now.
            raise RankDiedError(tuple(set(range(self.world_size)) - set(self._ranks)), str(error)) from error
        replaced = tuple(
            rank for rank, link in sorted(self._ranks.items()) if link.child.pid != before.get(rank)
        )
        self.num_restarts += len(replaced)
        return replaced

    async def stop(self) -> None:
        """Tell the ranks to leave, kill those that do not, and wait until no process is left."""
        leave_seconds = self._config.timeouts.leave_seconds
        await asyncio.gather(*(rank.end(leave_seconds) for rank in self._in_order()))
        if self._zygote is not None:
            await self._zygote.stop()
        await self._listener.stop()

    async def _bring_up(self) -> None:
        """Start what is missing and join a new generation, again and again when ranks die meanwhile."""
        for tries_left in reversed(range(MAX_RECOVERY_TRIES)):
            try:
                await self._start_missing()
                await self._join_next_generation()
            except RankDiedError as error:
                if tries_left == 0:
                    raise
                logger.warning("starting again what died: %s", error)
            else:
                return

    async def _start_missing(self) -> None:
        zygote = await self._living_zygote()
        if self._store is None or self._store.exited.done():
            self._store = await zygote.start_store()
            self._store.exited.add_done_callback(lambda _exit_code: self._loss.set())
        replace_all = self._config.replace == "all"
        for rank in self._in_order():
            if replace_all or rank.loss is not None or rank.child.exited.done():
                del self._ranks[rank.rank]
                await rank.end()
        # From here on a loss is a new one; no await since the dead were sorted out.
        self._loss.clear()
        missing = sorted(set(range(self.world_size)) - set(self._ranks))
        deaths = await _all_of(self._start_rank(rank, zygote) for rank in missing)
        for death in filter(None, deaths):
            raise death

    async def _living_zygote(self) -> ZygoteLink:
        if self._zygote is None or self._zygote.lost.is_set():
            self._zygote = await ZygoteLink.start(self._prepare_zygote(), self._config.timeouts.load_seconds)
        return self._zygote

    async def _start_rank(self, rank: int, zygote: ZygoteLink) -> RankDiedError | None:
        """Returns a death instead of raising it, so that the ranks beside it go on loading."""
        try:
            link = await RankLink.start(
                rank, self._load(rank), self._config.timeouts.load_seconds, self._listener, zygote
            )
        except RankDiedError as death:
            return death
        self._ranks[rank] = link
        logger.info("rank %d is process %d", rank, link.child.pid)
        link.watch(self._loss.set)
        return None

    async def _join_next_generation(self) -> None:
        if self._store is None:
            raise ValueError("the store must be started first")
        if self._loss.is_set():
            raise self._loss_error()
        self._generation += 1
        timeouts = self._config.timeouts
        command = JoinGroup(
            generation=self._generation,
            world_size=self.world_size,
            store_port=self._store.store_port,
            init_timeout_seconds=timeouts.init_seconds,
            collective_timeout_seconds=timeouts.collective_seconds,
        )
        # Every answer is waited for: the next try finds all survivors ready.
        outcomes = await asyncio.gather(
            *(rank.join(command, timeouts.join_seconds) for rank in self._in_order()), return_exceptions=True
        )
        for failure in filter(None, outcomes):
            raise failure
        logger.info("%d ranks joined generation %d", self.world_size, self._generation)

    def _prepare_zygote(self) -> PrepareZygote:
        return PrepareZygote(
            start_method=self._config.start_method,
            environment=self._config.environment,
            socket_path=self._listener.socket_path,
            log=self._config.log,
        )

    def _load(self, rank: int) -> Load:
        return Load(
            model_path=self._config.model_path,
            extra_model_path=self._config.extra_model_path,
            layout=self._config.layout,
            device_type=self._config.device_type,
            local_index=self._config.local_indices[rank],
            num_threads=self._config.threads_per_rank,
            compile_shapes=self._config.compile_shapes,
            log=self._config.log,
        )

    def _in_order(self) -> list[RankLink]:
        return [self._ranks[rank] for rank in sorted(self._ranks)]

    def _loss_error(self) -> RankDiedError:
        if self._zygote is not None and self._zygote.lost.is_set():
            return RankDiedError(tuple(range(self.world_size)), f"their zygote was lost: {self._zygote.loss}")
        dead = [rank for rank in self._in_order() if rank.loss is not None]
        if not dead and self._store is not None and self._store.exited.done():
            return RankDiedError((), f"the store was lost: {describe_exit(self._store.exited.result())}")
        reasons = sorted({rank.loss for rank in dead if rank.loss is not None})
        cause = min((rank.loss_cause for rank in dead), key=_BLAME.index, default=LossCause.OUTSIDE)
        return RankDiedError(tuple(rank.rank for rank in dead), ", ".join(reasons), cause)


def _failures(running: list[asyncio.Task[PlanDone]]) -> list[RankDiedError]:
    """The losses among tasks; raises what is no loss."""
    failures = []
    for task in running:
        error = task.exception() if task.done() and not task.cancelled() else None
        if isinstance(error, RankDiedError):
            failures.append(error)
        elif error is not None:
            raise error
    return failures


async def _all_of(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all at once; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
    else:
        return [task.result() for task in running]
    raise first
