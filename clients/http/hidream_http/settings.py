"""What an operator decides about the bridge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hidream.connection import DEFAULT_ADDRESS, Tls

DEFAULT_LISTEN = "127.0.0.1:8080"
MEBIBYTE = 1024 * 1024


class SettingError(Exception):
    """A setting that cannot be used; the text is one line that begins with its flag."""

    def __init__(self, flag: str, reason: str) -> None:
        super().__init__(f"{flag}: {reason}")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of a listener that encrypts.

    Attributes:
        certificate: the certificate of the bridge, then those between it and its authority.
        key: the private key of the certificate, without a passphrase.
        client_ca: authorities, one of which vouches for each caller; None where callers need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one bridge.

    Attributes:
        server: address of the gRPC server.
        server_tls: how the connection to it is encrypted; None for plaintext.
        listen: HOST:PORT to serve HTTP on; port 0 takes a free one.
        tls: files of the listener; None for plain HTTP.
        cors_origins: origins whose pages may call, or `*`; empty for none.
        max_body_bytes: largest body of a request.
        timeout_seconds: deadline of calls with one answer that name none.
        drain_seconds: time after SIGTERM in which running requests may end.
    """

    server: str = DEFAULT_ADDRESS
    server_tls: Tls | None = None
    listen: str = DEFAULT_LISTEN
    tls: TlsFiles | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * MEBIBYTE
    timeout_seconds: float = 30.0
    drain_seconds: float = 30.0
