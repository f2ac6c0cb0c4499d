"""Runs a bridge: listens, serves until it is told to end, and lets running requests end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hidream_http.application import build
from hidream_http.bridge import NAME_OF_CALLER
from hidream_http.draining import Drain
from hidream_http.leaving import ended
from hidream_http.settings import SettingError, Settings
from hidream_http.tls import ListenerTls, name_of_caller

logger = logging.getLogger(__name__)

MAX_PORT = 65_535
MAX_HEAD_BYTES = 65_536
END_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Stop:
    """How the bridge is told to end.

    Attributes:
        first: no more requests; those that run may end.
        second: at once.
    """

    first: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self) -> None:
        """Go one step further."""
        (self.second if self.first.is_set() else self.first).set()


class _Server(uvicorn.Server):
    """The server of uvicorn, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the signals alone."""
        yield


class _Connection(H11Protocol):
    """A connection of uvicorn; each of its requests knows the name in the certificate of its sender."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the name, which no request can change."""
        super().connection_made(transport)
        # The handshake has checked it; there is none where callers need no certificate.
        if certificate := transport.get_extra_info("peercert"):
            self.app_state = {**self.app_state, NAME_OF_CALLER: name_of_caller(certificate)}


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; belongs to the main thread.

    Args:
        settings: of the bridge.
        announce: is told where the bridge listens.

    Raises:
        SettingError: in one line, what is wrong with the settings.
    """
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    with listening_socket(settings.listen) as listener:
        await serve_until(stop, settings, listener, announce)


async def serve_until(
    stop: Stop, settings: Settings, listener: socket.socket, announce: Callable[[str], None]
) -> None:
    """Serve on a socket until the bridge is told to end.

    Args:
        stop: tells it.
        settings: of the bridge.
        listener: connections wait there already.
        announce: is told where the bridge listens, when nothing is wrong with its settings.

    Raises:
        SettingError: in one line, what is wrong with the settings.
    """
    drain, tls = Drain(), ListenerTls(settings.tls) if settings.tls else None
    config = uvicorn.Config(
        build(settings, drain),
        # httptools is quicker, and takes a head of any size into memory.
        http=_Connection,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        loop="none",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=END_SECONDS,
        ssl_context_factory=None if tls is None else lambda *_: tls.context(),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    url = _url(listener, settings)
    announce(url)
    logger.info("listening on %s; calls go to %s", url, settings.server)
    ending = asyncio.create_task(_drain(drain, stop, settings.drain_seconds))
    await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    await ended(ending)


async def _drain(drain: Drain, stop: Stop, drain_seconds: float) -> None:
    """Return when the bridge is told to end and no request runs, or those that do have been told."""
    await stop.first.wait()
    logger.info("draining: running requests may end within %g s", drain_seconds)
    drain.has_begun.set()
    idle, at_once = asyncio.create_task(drain.wait_until_idle()), asyncio.create_task(stop.second.wait())
    await asyncio.wait((idle, at_once), timeout=drain_seconds, return_when=asyncio.FIRST_COMPLETED)
    drain.is_over.set()
    await ended(idle, at_once)


def listening_socket(listen: str) -> socket.socket:
    """The socket of HOST:PORT, on which connections wait from now on.

    Raises:
        SettingError: it is no address, or not one of this machine, or another process listens there.
    """
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host:
        colon = ""
    if not host or not colon or not (port.isascii() and port.isdecimal()) or int(port) > MAX_PORT:
        raise SettingError("--listen", f"{listen!r} is not HOST:PORT (an IPv6 address in brackets)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingError("--listen", f"{listen} is in use") from None
        # Python adds the address to the reason, in parentheses.
        reason = str(error.strerror).partition(" (")[0]
        raise SettingError("--listen", f"cannot listen on {listen}: {reason}") from None


def _url(listener: socket.socket, settings: Settings) -> str:
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
