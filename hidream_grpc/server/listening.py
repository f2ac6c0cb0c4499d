"""The gRPC server of grpc.aio, and the address that it listens on."""

from __future__ import annotations

import errno
import socket

import grpc.aio

from hidream_grpc.errors import AddressInUseError, ConfigurationError
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.server.tls import CERTIFICATE_FLAG, ServerTls

LISTEN_FLAG = "--listen"
MAX_PORT = 65_535

OTHER_CALLS_OF_A_CONNECTION = 100
"""Calls that one connection may have open beside as many streams as the server has."""


def grpc_server(limits: RequestLimits, interceptor: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    """Make a server that listens nowhere yet."""
    return grpc.aio.server(
        interceptors=(interceptor,),
        options=(
            # With it a second server would silently share the port.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.max_receive_message_bytes),
            # Calls beyond it wait silently in the client, so the limits of streams must be lower.
            ("grpc.max_concurrent_streams", limits.max_streams + OTHER_CALLS_OF_A_CONNECTION),
            # Together these notice a frozen client in seconds instead of a minute.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # Clients ask every 10 s; sooner, by a hair, must not count as abuse.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ),
    )


def bind(server: grpc.aio.Server, listen: str, tls: ServerTls | None = None) -> tuple[str, int]:
    """Have a server listen on HOST:PORT, encrypted where there is TLS.

    Returns:
        The host, and the port that it got.

    Raises:
        ConfigurationError: it is no address, or not one of this machine, or grpc refuses the certificate.
        AddressInUseError: another process listens there.
    """
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host:
        colon = ""
    if not host or not colon or not port.isdecimal() or int(port) > MAX_PORT:
        raise ConfigurationError(LISTEN_FLAG, f"{listen!r} is not HOST:PORT (an IPv6 address in brackets)")
    _check_free(host, int(port), listen)
    try:
        if tls is None:
            bound = server.add_insecure_port(listen)
        else:
            bound = server.add_secure_port(listen, tls.credentials())
    except RuntimeError:
        bound = 0
    if bound == 0:
        if tls is not None:
            # Raises where the address is what is wrong.
            _check_free(host, int(port), listen)
            raise ConfigurationError(CERTIFICATE_FLAG, "grpc does not take this kind of certificate or key")
        raise AddressInUseError(LISTEN_FLAG, listen)
    return host, bound


def _check_free(host: str, port: int, listen: str) -> None:
    """Find out what grpc does not say: whether the address is in use, or is none of this machine's."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(LISTEN_FLAG, listen) from None
        # Python adds the address to the reason, in parentheses.
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigurationError(LISTEN_FLAG, f"cannot listen on {listen}: {reason}") from None
