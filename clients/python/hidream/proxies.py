"""The proxy of the environment by which gRPC reaches a server; none leads back to this machine."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

# In the order in which gRPC looks at them; the first that is set counts, an empty one too.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")
_WITHOUT_PROXY = ("unix", "unix-abstract", "vsock")


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own, where no proxy has a part."""
    host = _host(address)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def proxy_of(address: str) -> str | None:
    """Name the proxy by which an address is reached, and the variable that says so; None for no proxy."""
    variable = next((name for name in _PROXY_VARIABLES if name in os.environ), None)
    host = _host(address)
    if variable is None or not host or is_loopback(address) or _is_exception(host):
        return None
    url = urlsplit(os.environ[variable])
    if url.scheme != "http" or not url.hostname:
        return None
    # Without the name and the password that may stand in it.
    return f"{url.netloc.rpartition('@')[2]} ({variable})"


def _host(address: str) -> str:
    scheme, _, rest = address.partition(":")
    if scheme in _WITHOUT_PROXY:
        return ""
    if scheme in ("dns", "ipv4", "ipv6"):
        address = rest.rpartition("/")[2]
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, _, _ = address.rpartition(":")
    return address.lower() if not host or ":" in host else host.lower()


def _is_exception(host: str) -> bool:
    variable = next((name for name in _EXCEPTION_VARIABLES if name in os.environ), None)
    entries = os.environ[variable].lower().split(",") if variable else ()
    return any(_covers(entry.strip(), host) for entry in entries)


def _covers(entry: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        suffix = entry.removeprefix(".")
        return bool(suffix) and (host == suffix or host.endswith(f".{suffix}"))
