"""Addresses as people write them: `host`, `host:port`, a URL, or any target of gRPC."""

from __future__ import annotations

import re
from ipaddress import ip_address

from hidream.connection import Tls
from hidream.errors import AddressError

DEFAULT_PORT = 8088
_HTTPS_PORT = 443
_GRPC_TARGET = re.compile(r"(?:dns|unix|unix-abstract|ipv4|ipv6|vsock|xds):.+")
_URL = re.compile(r"(https?)://(.*?)/?", re.IGNORECASE)
_HOST_AND_PORT = re.compile(r"([^\s:/\[\]]+|\[[^\s\[\]]+\])(?::(.*))?")


def endpoint(address: str, tls: Tls | None = None) -> tuple[str, Tls | None]:
    """Return the target of gRPC that an address means, and how the connection is encrypted.

    Args:
        address: without a port it means 8088, or 443 behind `https://`.
        tls: what is asked for besides; `https://` alone means TLS with the public authorities.

    Raises:
        AddressError: it is none of these, its port is out of range, or it is `http://` with `tls`.
    """
    if _GRPC_TARGET.fullmatch(address):
        return address, tls
    scheme, authority, port = "", address, DEFAULT_PORT
    if url := _URL.fullmatch(address):
        scheme, authority = url[1].lower(), url[2]
    if scheme == "http" and tls is not None:
        raise AddressError(address, "http:// is not encrypted, and TLS is asked for: say https://")
    if scheme == "https":
        port, tls = _HTTPS_PORT, tls or Tls()
    return _with_port(address, authority, port), tls


def _with_port(address: str, authority: str, port: int) -> str:
    if _is_ipv6(authority):
        return f"[{authority}]:{port}"
    match = _HOST_AND_PORT.fullmatch(authority)
    if match is None:
        raise AddressError(address, "is no host, host:port, http:// or https:// URL without a path")
    if match[2] is not None:
        if not (match[2].isascii() and match[2].isdecimal() and 1 <= int(match[2]) <= 65535):
            raise AddressError(address, f"port {match[2]!r} is not 1 to 65535")
        port = int(match[2])
    return f"{match[1]}:{port}"


def _is_ipv6(host: str) -> bool:
    try:
        return ip_address(host).version == 6
    except ValueError:
        return False
