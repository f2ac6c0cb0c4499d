"""The server's end of one rank: its process, its socket, its counter of collectives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from hidream_grpc.background import BackgroundTasks
from hidream_grpc.devices.device_types import DeviceMemory
from hidream_grpc.engine.group.hang_detection import RankSample
from hidream_grpc.engine.group.listener import RankListener
from hidream_grpc.engine.group.proc_stat import sample_process
from hidream_grpc.engine.group.zygote_link import ChildProcess, KillReason, ZygoteLink
from hidream_grpc.engine.protocol.channel import AsyncChannel, FrameError
from hidream_grpc.engine.protocol.collective_counter import CollectiveCounterReader
from hidream_grpc.engine.protocol.messages import (
    DeviceOpened,
    Event,
    GiveSnapshot,
    GroupBroken,
    Joined,
    JoinGroup,
    Leave,
    Load,
    Loaded,
    LoadFailed,
    LoadWeights,
    PlanDone,
    SnapshotGiven,
    StepPlan,
)
from hidream_grpc.engine.protocol.processes import OomKills, cause_of_exit
from hidream_grpc.errors import (
    DeviceFailedError,
    InsufficientMemoryError,
    LossCause,
    RankDiedError,
    StartupError,
)

logger = logging.getLogger(__name__)

EXIT_SECONDS = 1.0
"""Time that a rank whose socket closed has to end by itself, with an exit code of its own."""


class RankLink:
    """One rank process, from its first connection until it is lost.

    Answers come in the order of the commands. A late answer, to a plan or a generation that was given up, is
    dropped.

    Attributes:
        rank: index of the rank in every generation's group.
        child: process of the rank.
        loaded: report of the rank after loading; None before.
        has_worked: whether the rank has finished a plan, and so is warm.
        loss: how the rank died, in words; None while it lives.
        loss_cause: what caused the loss; meaningful once `loss` is set.
    """

    def __init__(
        self,
        rank: int,
        child: ChildProcess,
        channel: AsyncChannel[Event],
        zygote: ZygoteLink,
        counter: CollectiveCounterReader,
    ) -> None:
        self.rank = rank
        self.child = child
        self.loaded: Loaded | None = None
        self.has_worked = False
        self.loss: str | None = None
        self.loss_cause = LossCause.OUTSIDE
        self._oom_kills = OomKills()
        self._channel = channel
        self._zygote = zygote
        self._counter = counter
        self._generation = 0
        self._when_lost: Callable[[], None] | None = None
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._tasks = BackgroundTasks()
        self._reader = self._tasks.start(self._read(), f"reading from rank {rank}")

    @classmethod
    async def start(
        cls,
        rank: int,
        make_load: Callable[[Path], Load],
        may_load: Callable[[DeviceMemory], Awaitable[None]],
        timeout_seconds: float,
        listener: RankListener,
        zygote: ZygoteLink,
    ) -> RankLink:
        """Start the process of a rank and wait until it has loaded its weights.

        Args:
            rank: index of the rank.
            make_load: returns the first command of the rank, given the path of the page in which it counts
                its collectives.
            may_load: returns when the rank may load its weights, given the memory of its device.
            timeout_seconds: limit for the whole start but the wait in `may_load`: the ranks that are waited
                for there have limits of their own.
            listener: where the rank connects.
            zygote: the parent of the process.

        Raises:
            StartupError: the rank cannot load its weights, or the zygote cannot start it.
            DeviceFailedError: its device cannot be opened or loaded onto, it crashed meanwhile, or took
                too long.
            InsufficientMemoryError: it has no room for its weights; also raised by `may_load`.
            RankDiedError: it was killed meanwhile. After any error its process is gone.
        """
        child: ChildProcess | None = None
        link: RankLink | None = None
        counter = CollectiveCounterReader(listener.folder)
        oom_kills = OomKills()
        try:
            child = await zygote.start_rank(rank)
            async with asyncio.timeout(timeout_seconds) as limit:
                channel = await listener.connection_of(child)
                if channel is None:
                    raise RankDiedError((rank,), *_loss_of(child, oom_kills))
                link = cls(rank, child, channel, zygote, counter)
                await link._load(make_load(counter.path), may_load, limit)
        except BaseException as error:
            if link is not None:
                await link.end()
            elif child is not None:
                await zygote.kill(child)
            counter.close()
            if isinstance(error, TimeoutError):
                reason = f"rank {rank} did not load within {timeout_seconds:g} s"
                raise DeviceFailedError((rank,), reason, took_too_long=True) from None
            if isinstance(error, RankDiedError) and error.cause is LossCause.OUT_OF_MEMORY:
                reason = f"rank {rank} cannot load for want of the host's memory: {error.reason}"
                raise InsufficientMemoryError(reason) from None
            if isinstance(error, RankDiedError) and error.cause is not LossCause.OUTSIDE:
                raise DeviceFailedError((rank,), f"rank {rank} cannot load: {error.reason}") from None
            raise
        finally:
            counter.forget_file()
        return link

    async def join(self, command: JoinGroup, timeout_seconds: float) -> None:
        """Join the rank to a generation; return once every rank has joined.

        Raises:
            RankDiedError: the rank died, could not join, or took too long and was killed.
        """
        self._generation = command.generation
        await self._channel.send(command)
        try:
            async with asyncio.timeout(timeout_seconds):
                while True:
                    match await self._next_event():
                        case Joined(generation=command.generation):
                            return
                        case GroupBroken(generation=command.generation, reason=reason):
                            raise RankDiedError((self.rank,), reason)
        except TimeoutError:
            kill_reason = KillReason(f"did not join within {timeout_seconds:g} s", LossCause.OUTSIDE)
            await self._zygote.kill_hung(self.child, kill_reason)
            raise RankDiedError((self.rank,), kill_reason.reason) from None

    async def run(self, plan: StepPlan) -> PlanDone:
        """Run the rank's share of a plan.

        Raises:
            RankDiedError: the rank died, or left the group.
        """
        self._oom_kills.note()
        await self._channel.send(plan)
        while True:
            match await self._next_event():
                case PlanDone(plan_id=plan.plan_id) as done:
                    self.has_worked = True
                    return done
                case GroupBroken(generation=self._generation, reason=reason, cause=cause):
                    raise RankDiedError((self.rank,), reason, cause)

    async def snapshot_of(self, claim_id: str, step: int) -> bytes:
        """The snapshot of a request after a step; empty where the rank does not have it.

        Raises:
            RankDiedError: the rank died.
        """
        await self._channel.send(GiveSnapshot(claim_id=claim_id, step=step))
        while True:
            match await self._next_event():
                case SnapshotGiven(claim_id=given_id, step=given_step, data=data):
                    if (given_id, given_step) == (claim_id, step):
                        return data

    def sample(self) -> RankSample | None:
        """The state of the rank now; None when its process is gone."""
        process = sample_process(self.child.pid)
        if process is None:
            return None
        counts = self._counter.read()
        return RankSample(
            is_waiting=counts.is_waiting,
            num_collectives=counts.num_entered + counts.num_left,
            is_runnable=process.is_runnable,
            cpu_seconds=process.cpu_seconds,
        )

    async def kill_hung(self, reason: str, cause: LossCause = LossCause.FAULT) -> None:
        """Kill the rank, which hangs; the default cause says that it hangs in its work."""
        await self._zygote.kill_hung(self.child, KillReason(reason, cause))

    def watch(self, when_lost: Callable[[], None]) -> None:
        """Have `when_lost` called once the rank is lost: now, if it is already."""
        self._when_lost = when_lost
        if self.loss is not None:
            when_lost()

    async def end(self, grace_seconds: float = 0.0) -> None:
        """Ask the rank to leave, kill it if it does not within the grace time, and wait until it is gone."""
        self._when_lost = None
        await self._channel.send(Leave())
        await self._zygote.kill(self.child, grace_seconds)
        await asyncio.wait((self._reader,))
        self._counter.close()

    async def _load(
        self, load: Load, may_load: Callable[[DeviceMemory], Awaitable[None]], limit: asyncio.Timeout
    ) -> None:
        await self._channel.send(load)
        while self.loaded is None:
            match await self._next_event():
                case DeviceOpened(device=device):
                    memory = DeviceMemory(device.total_memory_bytes, device.free_memory_bytes)
                    async with _paused(limit):
                        await self._while_alive(may_load(memory))
                    await self._channel.send(LoadWeights())
                case Loaded() as loaded:
                    self.loaded = loaded
                case LoadFailed(reason=reason, is_out_of_memory=True):
                    raise InsufficientMemoryError(reason)
                case LoadFailed(reason=reason, is_device=True):
                    raise DeviceFailedError((self.rank,), reason)
                case LoadFailed(reason=reason):
                    raise StartupError(reason)
                case event:
                    raise RankDiedError((self.rank,), f"answered Load with {type(event).__name__}")

    async def _while_alive(self, waiting: Awaitable[None]) -> None:
        """Await something; raise RankDiedError if the rank is lost meanwhile."""
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait((task, self._reader), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self._loss_error()
            await task
        finally:
            task.cancel()

    def _loss_error(self) -> RankDiedError:
        return RankDiedError((self.rank,), self.loss or "lost", self.loss_cause)

    async def _next_event(self) -> Event:
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)
            raise self._loss_error()
        return event

    async def _read(self) -> None:
        try:
            while (event := await self._channel.receive()) is not None:
                self._events.put_nowait(event)
        except FrameError as error:
            self.loss = f"sent what is no message: {error}"
            self.loss_cause = LossCause.FAULT
        except Exception:
            logger.exception("what rank %d sent cannot be taken", self.rank)
            self.loss = "sent what cannot be taken"
            self.loss_cause = LossCause.FAULT
        await self._note_loss()

    async def _note_loss(self) -> None:
        """Wake the callers that wait for an answer, or for the loss."""
        try:
            await self._zygote.kill(self.child, EXIT_SECONDS)
            await self._channel.close()
            if self.loss is None:
                self.loss, self.loss_cause = _loss_of(self.child, self._oom_kills)
        finally:
            self.loss = self.loss or "lost"
            self._events.put_nowait(None)
            if self._when_lost is not None:
                self._when_lost()


@asynccontextmanager
async def _paused(limit: asyncio.Timeout) -> AsyncIterator[None]:
    """Pause a time limit inside the block; afterwards the same time is left of it."""
    clock = asyncio.get_running_loop().time
    end = limit.when()
    left_seconds = None if end is None else end - clock()
    limit.reschedule(None)
    yield
    if left_seconds is not None:
        limit.reschedule(clock() + left_seconds)


def _loss_of(child: ChildProcess, oom_kills: OomKills) -> tuple[str, LossCause]:
    """How a process that is gone ended, in words, and what caused it."""
    if child.kill_reason is not None:
        return child.kill_reason.reason, child.kill_reason.cause
    return child.end, cause_of_exit(child.exited.result(), oom_kills)
