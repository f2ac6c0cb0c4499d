"""How to reach a server, with calls that block or that are awaited."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

from hidream.errors import EventLoopError
from hidream.proxies import is_loopback, proxy_of
from hidream.v1.image_gen_pb2_grpc import ImageGenStub

if TYPE_CHECKING:
    # Only the types tell the awaited stub from the other one.
    from hidream.v1.image_gen_pb2_grpc import ImageGenAsyncStub

DEFAULT_ADDRESS = "localhost:8088"
SERVICE_NAME = "hidream.v1.ImageGen"

DEFAULT_KEEPALIVE_SECONDS = 10.0

_Options: TypeAlias = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """Encrypts the connection, and checks that the server is the one meant.

    Attributes:
        root_certificates: PEM, of the authorities that may vouch for the server; None for those that gRPC
            brings.
        private_key, certificate_chain: PEM, both or neither: they prove who this caller is (mutual TLS).
        server_name: the name in the server's certificate, where it differs from the address.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the same as gRPC's credentials."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the metadata of every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


class Connection:
    """A channel whose calls block; threads may share it.

    Attributes:
        proxy: what leads to the server, by name; None where nothing does.
    """

    def __init__(self, address: str, tls: Tls | None, keepalive_seconds: float) -> None:
        self.proxy = proxy_of(address)
        options = _channel_options(address, tls, keepalive_seconds)
        self._channel = (
            grpc.secure_channel(address, tls.credentials(), options)
            if tls
            else grpc.insecure_channel(address, options)
        )
        self.image_gen = ImageGenStub(self._channel)
        self.health = HealthStub(self._channel)

    def close(self) -> None:
        """Close the channel; calls that are under way are cancelled."""
        self._channel.close()


class AsyncConnection:
    """A channel whose calls are awaited; the first of them binds it to the running event loop.

    A call in another loop raises EventLoopError, until the first loop, or the connection in it, was closed.

    Attributes:
        proxy: what leads to the server, by name; None where nothing does.
    """

    def __init__(self, address: str, tls: Tls | None, keepalive_seconds: float) -> None:
        self.proxy = proxy_of(address)
        self._address = address
        self._tls = tls
        self._options = _channel_options(address, tls, keepalive_seconds)
        self._bound: _BoundChannel | None = None

    @property
    def image_gen(self) -> ImageGenAsyncStub:
        """The stub of the service in the running loop."""
        return self._in_running_loop().image_gen

    @property
    def health(self) -> HealthStub:
        """The stub of the health service in the running loop."""
        return self._in_running_loop().health

    async def close(self) -> None:
        """Close the channel, if there is one; calls that are under way are cancelled."""
        if self._bound is not None:
            bound, self._bound = self._in_running_loop(), None
            await bound.channel.close()

    def _in_running_loop(self) -> _BoundChannel:
        if self._bound is None or self._bound.loop.is_closed():
            # Calls of a loop that was closed have ended with it; the channel is closed when it is dropped.
            self._bound = _BoundChannel(self._address, self._tls, self._options)
        elif self._bound.loop is not asyncio.get_running_loop():
            raise EventLoopError
        return self._bound


class _BoundChannel:
    def __init__(self, address: str, tls: Tls | None, options: _Options) -> None:
        self.loop = asyncio.get_running_loop()
        self.channel = (
            grpc.aio.secure_channel(address, tls.credentials(), options)
            if tls
            else grpc.aio.insecure_channel(address, options)
        )
        self.image_gen = ImageGenStub(self.channel)
        self.health = HealthStub(self.channel)


def _channel_options(address: str, tls: Tls | None, keepalive_seconds: float) -> _Options:
    keepalive_ms = round(1000 * keepalive_seconds)
    options: list[tuple[str, str | int]] = [
        # By default gRPC waits up to two minutes between attempts.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A server that takes connections and says nothing: as long as for one that falls silent later.
        ("grpc.min_reconnect_backoff_ms", 2 * keepalive_ms),
        ("grpc.keepalive_time_ms", keepalive_ms),
        # Without it a ping may stay unanswered for a minute.
        ("grpc.http2.ping_timeout_ms", keepalive_ms),
        # A watch sends nothing but pings; by default the third waits for data.
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return tuple(options)
