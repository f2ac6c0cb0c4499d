"""Which host a call is counted for where callers have no tokens."""

from __future__ import annotations

import pytest

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.server.call import Call
from hidream_grpc.server.callers import COMMON_OWNER, CallerIdentification
from hidream_grpc.server.proxies import TrustedProxies, host_of


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:51234", "ipv4:10.0.0.7"),
        ("ipv6:%5B2001:db8::7%5D:51234", "ipv6:%5B2001:db8::7%5D"),
        ("ipv6:[2001:db8::7]:51234", "ipv6:[2001:db8::7]"),
        ("unix:/run/hidream.sock", "unix:/run/hidream.sock"),
        ("unix:", "unix:"),
    ],
)
def test_all_connections_of_a_host_are_one_caller(peer: str, host: str) -> None:
    assert host_of(peer) == host


def identified(peer: str, forwarded: tuple[str, ...], trusted: str | None) -> Call:
    call = Call(method="/hidream.v1.ImageGen/Generate", peer=peer, deadline=None)
    callers = CallerIdentification(None, None if trusted is None else TrustedProxies(trusted))
    callers.identify(call, [("x-forwarded-for", value) for value in forwarded])
    return call


@pytest.mark.parametrize(
    ("peer", "forwarded", "trusted", "caller"),
    [
        pytest.param("ipv4:10.0.0.7:5", ("203.0.113.9",), None, "ipv4:10.0.0.7", id="nobody is trusted"),
        pytest.param("ipv4:10.0.0.7:5", ("203.0.113.9",), "10.0.0.0/8", "ipv4:203.0.113.9", id="a proxy"),
        pytest.param("ipv4:11.0.0.7:5", ("203.0.113.9",), "10.0.0.0/8", "ipv4:11.0.0.7", id="another peer"),
        pytest.param("ipv4:10.0.0.7:5", (), "10.0.0.7", "ipv4:10.0.0.7", id="a proxy that says nothing"),
        pytest.param(
            "ipv4:10.0.0.7:5",
            ("6.6.6.6, 203.0.113.9",),
            "10.0.0.7",
            "ipv4:203.0.113.9",
            id="a claim",
        ),
        pytest.param(
            "ipv4:10.0.0.7:5",
            ("6.6.6.6,203.0.113.9", "10.0.0.8"),
            "10.0.0.0/8",
            "ipv4:203.0.113.9",
            id="two proxies",
        ),
        pytest.param("ipv4:10.0.0.7:5", ("unknown",), "10.0.0.7", "ipv4:10.0.0.7", id="no address"),
        pytest.param(
            "ipv6:%5B::1%5D:5", ("[2001:db8::9]:443",), "::1", "ipv6:[2001:db8::9]", id="IPv6 with a port"
        ),
        pytest.param("ipv6:%5B::ffff:10.0.0.7%5D:5", ("1.2.3.4:5",), "10.0.0.7", "ipv4:1.2.3.4", id="mapped"),
        pytest.param("unix:", ("1.2.3.4",), "unix,10.0.0.7", "ipv4:1.2.3.4", id="a socket"),
        pytest.param("unix:/run/x", ("1.2.3.4",), "10.0.0.7", "unix:/run/x", id="another socket"),
    ],
)
def test_without_tokens_the_nearest_host_that_is_no_trusted_proxy_is_the_caller_and_all_own_all_jobs(
    peer: str, forwarded: tuple[str, ...], trusted: str | None, caller: str
) -> None:
    call = identified(peer, forwarded, trusted)
    assert (call.caller, call.owner) == (caller, COMMON_OWNER)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "proxy.example", "10.0.0.0/8,", "10.0.0.0/33"])
def test_what_is_no_network_is_one_line(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^--trusted-proxies: .*; such as 10\.0\.0\.0/8,::1,unix$"):
        TrustedProxies(text)
