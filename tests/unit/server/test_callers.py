"""Which host or name of a certificate a call is counted for where callers have no tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from hidream.certificate_names import FORWARDED_NAME
from hidream_grpc.errors import ConfigurationError, UnauthenticatedError
from hidream_grpc.server.call import Call
from hidream_grpc.server.callers import COMMON_OWNER, CallerIdentification
from hidream_grpc.server.proxies import TRUSTED_BRIDGES_FLAG, TrustedProxies, host_of
from hidream_grpc.server.tokens import TokensFile


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


BRIDGE = "ipv4:10.0.0.7:5"


def named(
    *names: bytes, peer: str = BRIDGE, bridges: str | None = "10.0.0.7", have_certificates: bool = False
) -> Call:
    """A call of a peer that says these names; its own certificate, if it has one, is the bridge's."""
    call = Call(method="/hidream.v1.ImageGen/Generate", peer=peer, deadline=None)
    callers = CallerIdentification(
        proxies=TrustedProxies("10.0.0.7"),
        bridges=None if bridges is None else TrustedProxies(bridges, TRUSTED_BRIDGES_FLAG),
        have_certificates=have_certificates,
    )
    metadata: list[tuple[str, str | bytes]] = [("x-forwarded-for", "203.0.113.9")]
    metadata += [(FORWARDED_NAME, name) for name in names]
    callers.identify(call, metadata, lambda: {"peer_dns": [b"bridge.test"]})
    return call


@pytest.mark.parametrize("have_certificates", [False, True])
def test_a_trusted_bridge_names_its_caller_who_owns_the_jobs(have_certificates: bool) -> None:
    call = named("Jürgen".encode(), have_certificates=have_certificates)
    assert (call.caller, call.owner) == ("Jürgen", "Jürgen")


def test_no_other_peer_names_a_caller() -> None:
    # A trusted proxy may pass on what its callers write: it is no bridge.
    for peer, bridges, host in (
        (BRIDGE, None, "ipv4:203.0.113.9"),
        (BRIDGE, "10.0.0.8", "ipv4:203.0.113.9"),
        ("ipv4:11.0.0.7:5", "10.0.0.7", "ipv4:11.0.0.7"),
        ("unix:", "10.0.0.7", "unix:"),
    ):
        call = named(b"alice", peer=peer, bridges=bridges)
        assert (call.caller, call.owner) == (host, COMMON_OWNER)
        call = named(b"alice", peer=peer, bridges=bridges, have_certificates=True)
        assert (call.caller, call.owner) == ("bridge.test", "bridge.test")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((b"",), "CERTIFICATE_WITHOUT_NAME"),
        ((b"alice", b"bob"), "CERTIFICATE_WITHOUT_NAME"),
        ((b"a\nb",), "CERTIFICATE_NAME_UNUSABLE"),
        ((b"\xff",), "CERTIFICATE_NAME_UNUSABLE"),
        ((b"x" * 257,), "CERTIFICATE_NAME_UNUSABLE"),
    ],
)
def test_a_bridge_whose_caller_has_no_usable_name_is_refused(names: tuple[bytes, ...], reason: str) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        named(*names)
    assert refused.value.reason == reason


def test_a_bridge_that_saw_no_certificate_names_nobody() -> None:
    assert named().owner == COMMON_OWNER
    assert named(have_certificates=True).owner == "bridge.test"


def test_where_tokens_are_asked_for_no_bridge_names_a_caller(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("alice 0123456789abcdef-of-alice\n")
    callers = CallerIdentification(TokensFile(path), bridges=TrustedProxies("10.0.0.7"))
    call = Call(method="/hidream.v1.ImageGen/Generate", peer=BRIDGE, deadline=None)
    with pytest.raises(UnauthenticatedError):
        callers.identify(call, [(FORWARDED_NAME, b"alice")])
    token = ("authorization", "Bearer 0123456789abcdef-of-alice")
    callers.identify(call, [(FORWARDED_NAME, b"bob"), token])
    assert (call.caller, call.owner) == ("alice", "alice")


def test_a_wrong_network_of_bridges_is_named_by_its_flag() -> None:
    with pytest.raises(ConfigurationError, match=r"^--trusted-bridges: "):
        TrustedProxies("bridge.example", TRUSTED_BRIDGES_FLAG)
