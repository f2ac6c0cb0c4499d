"""How to reach a server: what both transports need to open a channel."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

DEFAULT_ADDRESS = "localhost:8088"
SERVICE_NAME = "hidream.v1.ImageGen"

# gRPC waits up to two minutes between attempts; somebody who waits for a server wants it sooner.
# Everything else is gRPC's default, which is enough for every image: they come in small pieces.
CHANNEL_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 2_000))


@dataclass(frozen=True, slots=True)
class Tls:
    """Encrypts the connection, and checks that the server is the one meant.

    Attributes:
        root_certificates: PEM, who may vouch for the server; None for the authorities that gRPC
            brings.
        private_key, certificate_chain: PEM, both or neither: who this caller is (mutual TLS).
        server_name: the name in the server's certificate, where it differs from the address.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = None
    certificate_chain: bytes | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """These, as gRPC wants them."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


def channel_options(tls: Tls | None) -> tuple[tuple[str, str | int], ...]:
    """Options of a channel."""
    if tls is None or tls.server_name is None:
        return CHANNEL_OPTIONS
    return (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", tls.server_name))


def call_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """Metadata of every call."""
    return () if token is None else (("authorization", f"Bearer {token}"),)
