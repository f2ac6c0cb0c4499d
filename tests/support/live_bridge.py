"""Runs the HTTP bridge before a server, in a thread of the test's process: real sockets, and cheap."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import httpx

from hidream_http.serving import Stop, listening_socket, serve_until
from hidream_http.settings import Settings

END_TIMEOUT_SECONDS = 60.0
CALL_TIMEOUT_SECONDS = 60.0


@dataclass
class LiveBridge:
    """A running bridge.

    Attributes:
        url: where it listens, without a path.
    """

    url: str
    _loop: asyncio.AbstractEventLoop
    _stop: Stop
    _thread: threading.Thread

    def client(self, **options: object) -> httpx.Client:
        """A client of its own connections, which knows no proxy."""
        return httpx.Client(**self._defaults, **options)  # type: ignore[arg-type]

    def async_client(self, **options: object) -> httpx.AsyncClient:
        """The same for asyncio."""
        return httpx.AsyncClient(**self._defaults, **options)  # type: ignore[arg-type]

    @property
    def _defaults(self) -> dict[str, object]:
        # Reading the authorities of the world takes longer than many a call.
        verified = {} if self.url.startswith("https:") else {"verify": False}
        return {"base_url": self.url, "trust_env": False, "timeout": CALL_TIMEOUT_SECONDS, **verified}

    def stop(self) -> None:
        """Do what a signal to end does."""
        self._loop.call_soon_threadsafe(self._stop)

    def wait_until_ended(self) -> None:
        """Return when nothing of it runs any more."""
        self._thread.join(END_TIMEOUT_SECONDS)
        assert not self._thread.is_alive(), "the bridge does not end"


@contextmanager
def running_bridge(server_address: str, settings: Settings | None = None) -> Iterator[LiveBridge]:
    """A bridge to a server on a free port of 127.0.0.1, until the block is left.

    Args:
        server_address: of the gRPC server.
        settings: the others.
    """
    settings = replace(settings or Settings(), server=server_address, listen="127.0.0.1:0")
    listener = listening_socket(settings.listen)
    is_ready = threading.Event()
    started: list[tuple[str, asyncio.AbstractEventLoop, Stop]] = []

    async def serve() -> None:
        stop = Stop()

        def announce(url: str) -> None:
            started.append((url, asyncio.get_running_loop(), stop))
            is_ready.set()

        await serve_until(stop, settings, listener, announce)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_ready.wait(END_TIMEOUT_SECONDS)
    [(url, loop, stop)] = started
    bridge = LiveBridge(url, loop, stop, thread)
    try:
        yield bridge
    finally:
        if thread.is_alive():
            # Twice: what a test has left running is not waited for.
            bridge.stop()
            bridge.stop()
        bridge.wait_until_ended()
