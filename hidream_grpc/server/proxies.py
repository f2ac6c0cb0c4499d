"""The caller behind proxies that the operator trusts, from what they wrote into `x-forwarded-for`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import unquote

from hidream_grpc.errors import ConfigurationError

TRUSTED_PROXIES_FLAG = "--trusted-proxies"
TRUSTED_BRIDGES_FLAG = "--trusted-bridges"
FORWARDED_FOR = "x-forwarded-for"

_SOCKETS = "unix"

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class TrustedProxies:
    """The peers that are believed when they say for whom they call."""

    def __init__(self, text: str, flag: str = TRUSTED_PROXIES_FLAG) -> None:
        """Read a list such as `10.0.0.0/8,::1`, the value of a flag; `unix` stands for every Unix socket.

        Raises:
            ConfigurationError: names the entry that is neither an address nor a network.
        """
        words = [word.strip() for word in text.split(",")]
        self._trusts_sockets = _SOCKETS in words
        self._networks = tuple(_network(word, flag) for word in words if word != _SOCKETS)

    def caller_of(self, peer: str, forwarded: Sequence[str]) -> str:
        """The nearest host of a call that is no trusted proxy.

        Args:
            peer: as grpc names it.
            forwarded: the values of `x-forwarded-for`; each proxy has added its own peer at the end.
        """
        caller = host_of(peer)
        is_trusted = self.trusts(peer)
        for entry in reversed(",".join(forwarded).split(",")):
            address = _address(entry.strip())
            if not is_trusted or address is None:
                break
            caller = f"ipv4:{address}" if address.version == 4 else f"ipv6:[{address}]"
            is_trusted = self._trusts(address)
        return caller

    def trusts(self, peer: str) -> bool:
        """Whether a peer, as grpc names it, is one of them."""
        return self._trusts_sockets if peer.startswith("unix:") else self._trusts(_peer_address(peer))

    def _trusts(self, address: _Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def host_of(peer: str) -> str:
    """The peer's address without its port, so that one host is one caller."""
    scheme, _, address = peer.partition(":")
    return f"{scheme}:{address.rpartition(':')[0] or address}"


def _peer_address(peer: str) -> _Address | None:
    return _address(unquote(peer.partition(":")[2]))


def _address(text: str) -> _Address | None:
    """The address of `10.0.0.7`, `10.0.0.7:51234`, `::1` or `[::1]:51234`; None for anything else."""
    with_port = re.fullmatch(r"\[(.*)\](?::\d+)?|([\d.]+):\d+", text)
    try:
        address = ipaddress.ip_address((with_port[1] or with_port[2]) if with_port else text)
    except ValueError:
        return None
    # One host, however it was reached.
    return getattr(address, "ipv4_mapped", None) or address


def _network(word: str, flag: str) -> _Network:
    try:
        return ipaddress.ip_network(word)
    except ValueError as error:
        raise ConfigurationError(flag, f"{error}; such as 10.0.0.0/8,::1,unix") from None
