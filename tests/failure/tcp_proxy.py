"""A connection to a database or a bucket that can be cut, delayed, and made silent while it is used."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

READ_BYTES = 64 * 1024
RESET_AT_ONCE = struct.pack("ii", 1, 0)


class TcpProxy:
    """Forwards a port of 127.0.0.1 to a Unix socket or to another port; any thread may call.

    The loop of the proxy runs in a thread of its own: a test that waits does not stop the bytes.

    Attributes:
        port: where servers connect.
        num_connections: that were ever accepted.
        num_messages: times that a server said something; one that waits for each answer says each at once.
    """

    def __init__(self, upstream: Path | tuple[str, int]) -> None:
        self._upstream = upstream
        self._links: set[_Link] = set()
        self._refuses = False
        self._to_upstream_seconds = 0.0
        self._to_server_seconds = 0.0
        # Set while bytes may pass.
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._thread.start()
        self.port = 0
        self.num_connections = 0
        self.num_messages = 0
        self._call(self._listen)

    def cut(self) -> None:
        """Reset every connection, and each new one, until `heal`."""
        self._call(self._cut)

    def silence(self) -> None:
        """Accept connections and bytes, and forward nothing in either direction, until `heal`."""
        self._call(self._flowing.clear)

    def delay(self, *, to_upstream_seconds: float = 0.0, to_server_seconds: float = 0.0) -> None:
        """Hold every byte from now on for so long, in each direction."""
        self._to_upstream_seconds = to_upstream_seconds
        self._to_server_seconds = to_server_seconds

    def redirect(self, upstream: Path | tuple[str, int]) -> None:
        """Take new connections elsewhere, as the name of a database does after a failover; old ones stay."""
        self._upstream = upstream

    def heal(self) -> None:
        """Forward at once again: what was held in silence, and what new connections send."""
        self.delay()
        self._call(self._heal)

    def close(self) -> None:
        """End every connection, and the thread."""
        self._call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, action: Callable[[], object]) -> None:
        """Run a plain function or a coroutine function in the loop, to its end."""

        async def run() -> None:
            result = action()
            if asyncio.iscoroutine(result):
                await result

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def _cut(self) -> None:
        self._refuses = True
        for link in tuple(self._links):
            link.abort()

    def _heal(self) -> None:
        self._refuses = False
        self._flowing.set()

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        self._flowing.set()
        # Their handlers end before the loop does.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=5.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        link = _Link(writer)
        self._links.add(link)
        try:
            if self._refuses:
                return
            with contextlib.suppress(OSError):
                upstream_reader, upstream_writer = await self._connect()
                link.writers.append(upstream_writer)
                if not self._refuses:
                    await self._forward_both(link, reader, upstream_reader)
        finally:
            self._links.discard(link)
            link.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._upstream, Path):
            return await asyncio.open_unix_connection(str(self._upstream))
        return await asyncio.open_connection(*self._upstream)

    async def _forward_both(
        self, link: _Link, reader: asyncio.StreamReader, upstream_reader: asyncio.StreamReader
    ) -> None:
        server_writer, upstream_writer = link.writers
        async with asyncio.TaskGroup() as tasks:
            for source, target, delay_seconds, note in (
                (reader, upstream_writer, lambda: self._to_upstream_seconds, self._count),
                (upstream_reader, server_writer, lambda: self._to_server_seconds, lambda: None),
            ):
                held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
                tasks.create_task(_take(source, held, delay_seconds, note))
                tasks.create_task(self._give(held, target))

    def _count(self) -> None:
        self.num_messages += 1

    async def _give(self, held: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                due_time, data = await held.get()
                await asyncio.sleep(max(0.0, due_time - time.monotonic()))
                await self._flowing.wait()
                if not data:
                    # The source has ended, and so does the pair.
                    target.close()
                    return
                target.write(data)
                await target.drain()


class _Link:
    """The two ends of one forwarded connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]

    def abort(self) -> None:
        """Reset both ends."""
        for writer in self.writers:
            # Without it the peer would see an orderly end.
            with contextlib.suppress(OSError):
                connection = writer.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_ONCE)
            writer.transport.abort()


async def _take(
    source: asyncio.StreamReader,
    held: asyncio.Queue[tuple[float, bytes]],
    delay_seconds: Callable[[], float],
    note: Callable[[], None],
) -> None:
    data = b"begun"
    while data:
        try:
            data = await source.read(READ_BYTES)
        except OSError:
            data = b""
        note()
        held.put_nowait((time.monotonic() + delay_seconds(), data))


@contextmanager
def running_proxy(upstream: Path | tuple[str, int]) -> Iterator[TcpProxy]:
    """A proxy that forwards at once until it is told otherwise; it ends with the block."""
    proxy = TcpProxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()
