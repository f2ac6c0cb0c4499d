"""The Unix socket to which ranks connect, in a folder that only this user may enter."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import tempfile
from pathlib import Path

from hidream_grpc.background import BackgroundTasks
from hidream_grpc.engine.group.folder import SOCKET_NAME, GroupFolder, has_room_for_socket_path
from hidream_grpc.engine.group.zygote_link import ChildProcess
from hidream_grpc.engine.protocol.channel import STREAM_BUFFER_BYTES, AsyncChannel, FrameError
from hidream_grpc.engine.protocol.messages import PROTOCOL_VERSION, Event, Hello
from hidream_grpc.errors import ConfigurationError

logger = logging.getLogger(__name__)

_PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of socket(7)


def check_temporary_folder() -> None:
    """Check that ranks can connect to a socket in the folder for temporary files.

    Raises:
        ConfigurationError: there is no such folder, or its path is too long for a socket.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        raise _cannot_make_folder(error) from None
    if not has_room_for_socket_path(folder):
        raise ConfigurationError("TMPDIR", f"{folder} is too long a path for a Unix socket in it")


class RankListener:
    """Accepts the connections of ranks and hands each to the caller that waits for that process."""

    def __init__(self) -> None:
        self._folder: GroupFolder | None = None
        self._server: asyncio.Server | None = None
        self._arrivals: dict[int, asyncio.Future[AsyncChannel[Event]]] = {}
        self._handshakes = BackgroundTasks()

    @property
    def folder(self) -> Path:
        """The folder of the socket, which only this user may enter; it exists between `start` and `stop`."""
        if self._folder is None:
            raise ValueError("the listener was not started")
        return self._folder.path

    @property
    def socket_path(self) -> Path:
        """Path of the socket; valid between `start` and `stop`."""
        return self.folder / SOCKET_NAME

    async def start(self) -> None:
        """Make the folder (mode 0700) and listen in it.

        Raises:
            ConfigurationError: there is no folder for temporary files, or its path is too long for a socket.
        """
        check_temporary_folder()
        try:
            self._folder = GroupFolder()
        except OSError as error:
            raise _cannot_make_folder(error) from None
        self._server = await asyncio.start_unix_server(
            self._connected, self.socket_path, limit=STREAM_BUFFER_BYTES
        )

    async def connection_of(self, child: ChildProcess) -> AsyncChannel[Event] | None:
        """Wait for the connection of a process, which the caller then owns; None if it ended first."""
        arrival = self._arrival(child.pid)
        try:
            await asyncio.wait((arrival, child.exited), return_when=asyncio.FIRST_COMPLETED)
            return arrival.result() if arrival.done() else None
        finally:
            del self._arrivals[child.pid]

    async def stop(self) -> None:
        """Stop listening, close the connections left over, remove the folder; may be called twice."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._handshakes.cancel()
        for arrival in self._arrivals.values():
            if arrival.done():
                await arrival.result().close()
        self._arrivals.clear()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._handshakes.start(self._accept(reader, writer), "greeting a rank")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = AsyncChannel[Event](reader, writer, Event)
        peer_pid = _peer_pid(writer.get_extra_info("socket"))
        try:
            hello = await channel.receive()
        except FrameError as error:
            logger.warning("process %d sent no greeting: %s", peer_pid, error)
            hello = None
        if isinstance(hello, Hello) and (hello.pid, hello.protocol_version) == (peer_pid, PROTOCOL_VERSION):
            arrival = self._arrival(peer_pid)
            if not arrival.done():
                arrival.set_result(channel)
                return
        await channel.close()

    def _arrival(self, pid: int) -> asyncio.Future[AsyncChannel[Event]]:
        # A rank may connect before the zygote's report of its start is read, or after.
        return self._arrivals.setdefault(pid, asyncio.get_running_loop().create_future())


def _cannot_make_folder(error: OSError) -> ConfigurationError:
    return ConfigurationError("TMPDIR", f"cannot make a folder for the ranks: {error.strerror}")


def _peer_pid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid: int = _PEER_CREDENTIALS.unpack(credentials)[0]
    return pid
