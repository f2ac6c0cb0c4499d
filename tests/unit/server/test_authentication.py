from __future__ import annotations

import pytest

from hidream_grpc.server.call import Call, begin_call, current_call
from hidream_grpc.server.interceptors.authentication import (
    COMMON_OWNER,
    AuthenticationInterceptor,
    host_of,
)


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


async def test_without_tokens_each_host_is_a_caller_and_all_own_all_jobs() -> None:
    begin_call(Call(method="/hidream.v1.ImageGen/Generate", peer="ipv4:10.0.0.7:51234", deadline=None))
    interceptor = AuthenticationInterceptor(None)
    async with interceptor._authenticated(None):  # type: ignore[arg-type]
        call = current_call()
        assert (call.caller, call.owner) == ("ipv4:10.0.0.7", COMMON_OWNER)
