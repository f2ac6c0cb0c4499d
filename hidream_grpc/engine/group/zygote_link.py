"""The server's end of its zygote."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass

from hidream_grpc.background import BackgroundTasks
from hidream_grpc.engine.group.child_output import ChildOutput
from hidream_grpc.engine.group.stop_detection import watch_for_stops
from hidream_grpc.engine.protocol.channel import STREAM_BUFFER_BYTES, AsyncChannel, FrameError
from hidream_grpc.engine.protocol.messages import (
    KillProcess,
    PrepareZygote,
    ProcessEnded,
    ProcessStarted,
    StartRank,
    StartRefused,
    StartStore,
    ZygoteCommand,
    ZygoteEvent,
    ZygoteReady,
)
from hidream_grpc.engine.protocol.processes import describe_exit, wait_until_gone
from hidream_grpc.errors import LossCause, RankDiedError, StartupError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long a zygote may take to answer before it is killed; it forks in milliseconds."""

STOPPED = "stopped by a signal, and killed by the watchdog"


@dataclass(frozen=True, slots=True)
class KillReason:
    """Why the server had a process killed, in words and as the cause of its loss."""

    reason: str
    cause: LossCause


@dataclass(slots=True, eq=False)
class ChildProcess:
    """A rank or a store host.

    Attributes:
        pid: process id.
        exited: resolves once the process is gone, with its exit code, or minus the number of its signal.
        store_port: port of the store on the loopback interface; 0 for a rank.
        kill_reason: set before the process is killed because it hangs.
    """

    pid: int
    exited: asyncio.Future[int]
    store_port: int
    kill_reason: KillReason | None = None

    @property
    def end(self) -> str:
        """How the process ended, in words; valid once it is gone."""
        return self.kill_reason.reason if self.kill_reason else describe_exit(self.exited.result())


class ZygoteLink:
    """One zygote and its children, from `start` until it is lost or stopped.

    A process of them that is stopped (SIGSTOP) would block all others: it is killed after two samples,
    whatever it was doing.

    Attributes:
        prepare: the command that made the zygote ready.
        pid: process id of the zygote.
        lost: an event that is set when the zygote is gone, and its children with it.
        loss: how the zygote ended, in words.
    """

    def __init__(
        self,
        prepare: PrepareZygote,
        process: asyncio.subprocess.Process,
        channel: AsyncChannel[ZygoteEvent],
        output: ChildOutput,
    ) -> None:
        self.prepare = prepare
        self.pid = process.pid
        self.lost = asyncio.Event()
        self.loss = ""
        self._process = process
        self._channel = channel
        self._output = output
        self._children: dict[int, ChildProcess] = {}
        self._answers: asyncio.Queue[ZygoteReady | ChildProcess | StartRefused | None] = asyncio.Queue()
        self._one_command_at_a_time = asyncio.Lock()
        self._tasks = BackgroundTasks()
        self._reader = self._tasks.start(self._read(), "reading from the zygote")
        self._watcher = self._tasks.start(
            watch_for_stops(lambda: (self.pid, *self._children), self._end_stopped),
            "looking for stopped processes",
        )

    @classmethod
    async def start(cls, prepare: PrepareZygote, timeout_seconds: float) -> ZygoteLink:
        """Start a zygote and wait until it can start ranks.

        Raises:
            RuntimeError: not called from the main thread; the zygote dies with the thread that starts it.
            StartupError: the zygote cannot import what ranks need.
            RankDiedError: it died meanwhile, or took too long.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a zygote must be started from the main thread")
        server_end, zygote_end = socket.socketpair()
        with zygote_end:
            reader, writer = await asyncio.open_unix_connection(sock=server_end, limit=STREAM_BUFFER_BYTES)
            channel = AsyncChannel[ZygoteEvent](reader, writer, ZygoteEvent)
            output = ChildOutput()
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "hidream_grpc.engine.zygote.zygote", str(zygote_end.fileno()), str(os.getpid())),
                    pass_fds=(zygote_end.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output.write_end,
                    stderr=output.write_end,
                    # A Ctrl-C must not reach the interpreter before it ignores the signal.
                    start_new_session=True,
                )
            except BaseException:
                output.close()
                await channel.close()
                raise
            finally:
                os.close(output.write_end)
        link = cls(prepare, process, channel, output)
        try:
            await link._ask(prepare, timeout_seconds)
        except BaseException:
            await link.stop()
            raise
        return link

    async def start_rank(self, rank: int) -> ChildProcess:
        """Start the process of a rank.

        Raises:
            StartupError: the zygote refuses.
            RankDiedError: the zygote is lost.
        """
        return await self._start_child(StartRank(rank=rank))

    async def start_store(self) -> ChildProcess:
        """Start a store host; raises as `start_rank` does."""
        return await self._start_child(StartStore())

    async def kill(self, child: ChildProcess, grace_seconds: float = 0.0) -> int:
        """SIGKILL a child, unless it ended or ends by itself, and wait until it is gone.

        Returns:
            Its exit code, or minus the number of the signal that killed it.
        """
        await asyncio.wait((child.exited,), timeout=grace_seconds)
        if not child.exited.done():
            await self._channel.send(KillProcess(pid=child.pid))
            await asyncio.wait((child.exited,), timeout=ANSWER_SECONDS)
        if not child.exited.done():
            self._give_up(f"did not report the end of process {child.pid}")
        return await asyncio.shield(child.exited)

    async def kill_hung(self, child: ChildProcess, reason: KillReason) -> None:
        """Kill a child that hangs, and record why, for the callers that wait for it."""
        child.kill_reason = child.kill_reason or reason
        logger.warning("killing process %d: %s", child.pid, child.kill_reason.reason)
        await self.kill(child)

    async def stop(self) -> None:
        """Kill all children and the zygote, and wait until they are gone; may be called twice."""
        await asyncio.gather(*(self.kill(child) for child in list(self._children.values())))
        self._give_up("ended")
        await asyncio.wait((self._reader,))

    async def _start_child(self, command: StartRank | StartStore) -> ChildProcess:
        child = await self._ask(command, ANSWER_SECONDS)
        if not isinstance(child, ChildProcess):
            raise TypeError(f"the zygote answered {command} with {child}")
        return child

    async def _ask(self, command: ZygoteCommand, timeout_seconds: float) -> ZygoteReady | ChildProcess:
        async with self._one_command_at_a_time:
            if self.lost.is_set():
                raise self._loss_error()
            await self._channel.send(command)
            try:
                async with asyncio.timeout(timeout_seconds):
                    answer = await self._answers.get()
            except BaseException as error:
                # A late answer must not be taken for that of the next command.
                self._give_up(f"did not answer within {timeout_seconds:g} s")
                if isinstance(error, TimeoutError):
                    raise self._loss_error() from None
                raise
        if answer is None:
            raise self._loss_error()
        if isinstance(answer, StartRefused):
            raise StartupError(answer.reason)
        return answer

    def _loss_error(self) -> RankDiedError:
        return RankDiedError((), f"the zygote was lost: {self.loss}")

    def _give_up(self, reason: str) -> None:
        if self._process.returncode is None:
            self.loss = self.loss or reason
            self._process.kill()

    async def _end_stopped(self, stopped: frozenset[int]) -> None:
        if self.pid in stopped:
            # A stopped zygote can end no child; the children end with it.
            self._give_up(STOPPED)
            return
        children = [self._children[pid] for pid in stopped if pid in self._children]
        reason = KillReason(STOPPED, LossCause.OUTSIDE)
        await asyncio.gather(*(self.kill_hung(child, reason) for child in children))

    async def _read(self) -> None:
        try:
            while (event := await self._channel.receive()) is not None:
                self._handle(event)
        except FrameError as error:
            self._give_up(f"sent what is no message: {error}")
        except Exception:
            logger.exception("what the zygote sent cannot be taken")
            self._give_up("sent what cannot be taken")
        exit_code = await self._process.wait()
        self._watcher.cancel()
        self.loss = self.loss or describe_exit(exit_code)
        await self._channel.close()
        # The kernel kills the children with their parent, and no zygote is left to report it.
        await asyncio.gather(*(wait_until_gone(pid) for pid in self._children))
        # Forward the last lines of their output before their loss is reported.
        self._output.close()
        self.lost.set()
        for child in self._children.values():
            child.exited.set_result(-signal.SIGKILL)
        self._children.clear()
        self._answers.put_nowait(None)

    def _handle(self, event: ZygoteEvent) -> None:
        match event:
            case ProcessStarted(pid=pid, store_port=store_port):
                exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
                self._children[pid] = child = ChildProcess(pid, exited, store_port)
                self._answers.put_nowait(child)
            case ProcessEnded(pid=pid, exit_code=exit_code):
                self._children.pop(pid).exited.set_result(exit_code)
            case ZygoteReady(import_seconds=import_seconds):
                logger.info("zygote %d is ready after %.1f s of imports", self.pid, import_seconds)
                self._answers.put_nowait(event)
            case StartRefused():
                self._answers.put_nowait(event)
