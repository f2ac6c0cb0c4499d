from __future__ import annotations

from pathlib import Path

import pytest

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.errors import NotServingError, UnavailableError
from hidream.proxies import is_loopback, proxy_of
from tests.clients.breaking_server import breaking_image_gen, serving
from tests.clients.conftest import HealthOnlyServer
from tests.clients.test_hidream_command import hidream

DEAD_PROXY = "127.0.0.1:1"
ELSEWHERE = "192.0.2.1:8088"


@pytest.fixture(autouse=True)
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this proxy, at which nothing listens."""
    for variable in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", f"http://name:secret@{DEAD_PROXY}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_proxy_of_the_environment_has_no_part_in_calls_of_this_machine(
    host: str, tmp_path: Path
) -> None:
    with serving(breaking_image_gen()) as address:
        address = address.replace("127.0.0.1", host)
        with Client(address) as client:
            assert client.status("a").job_id
        async with AsyncClient(address) as client:
            assert (await client.status("a")).job_id
        result = hidream(address, "generate", "a", "--out", "a.png", folder=tmp_path)
        assert result.returncode == 0, result.stderr


def test_the_wait_for_a_server_of_this_machine_takes_no_proxy(health_only_server: HealthOnlyServer) -> None:
    health_only_server.start()
    health_only_server.is_serving = True
    result = hidream(health_only_server.address, "health", "--wait", "60")
    assert (result.returncode, result.stdout) == (0, "SERVING\n"), result.stderr


async def test_a_connection_that_fails_at_a_proxy_names_it() -> None:
    named = rf"\(through the proxy {DEAD_PROXY} \(http_proxy\)\)"
    with Client(ELSEWHERE) as client:
        with pytest.raises(UnavailableError, match=named) as failed:
            client.info()
        assert "secret" not in str(failed.value)
        with pytest.raises(UnavailableError, match=named):
            client.draw("a")
        with pytest.raises(NotServingError, match=f"nothing answers through the proxy {DEAD_PROXY}"):
            client.wait_until_serving(0.1)
    async with AsyncClient(ELSEWHERE) as client:
        with pytest.raises(UnavailableError, match=named):
            await client.info()
    result = hidream(ELSEWHERE, "info")
    assert result.returncode == 3
    assert f"through the proxy {DEAD_PROXY}" in result.stderr


@pytest.mark.parametrize(
    "address",
    [
        *("localhost:8088", "localhost", "LOCALHOST:1", "a.localhost:1", "127.1.2.3:1", "[::1]:1", "::1"),
        *("dns:///localhost:1", "dns://8.8.8.8/127.0.0.1:1", "ipv4:127.0.0.1:1", "ipv6:[::1]:1"),
    ],
)
def test_addresses_of_this_machine_are_known(address: str) -> None:
    assert is_loopback(address)
    assert proxy_of(address) is None


@pytest.mark.parametrize(
    ("address", "environment", "named"),
    [
        ("a.example:1", {}, f"{DEAD_PROXY} (http_proxy)"),
        ("dns:///a.example:1", {"https_proxy": "http://b:2"}, "b:2 (https_proxy)"),
        ("[2001:db8::1]:1", {"grpc_proxy": "http://c:3", "https_proxy": "http://b:2"}, "c:3 (grpc_proxy)"),
        ("unix:/run/a", {}, None),
        ("a.example:1", {"grpc_proxy": ""}, None),
        ("a.example:1", {"http_proxy": "socks5://b:2"}, None),
        ("a.example:1", {"no_proxy": "b.example, .example"}, None),
        ("a.example:1", {"no_proxy": "A.EXAMPLE"}, None),
        ("10.1.2.3:1", {"no_proxy": "10.0.0.0/8"}, None),
        ("10.1.2.3:1", {"no_grpc_proxy": "", "no_proxy": "10.0.0.0/8"}, f"{DEAD_PROXY} (http_proxy)"),
    ],
)
def test_the_proxy_is_the_one_that_grpc_takes(
    address: str, environment: dict[str, str], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert proxy_of(address) == named
