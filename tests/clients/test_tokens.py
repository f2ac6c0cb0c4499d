"""Every client brings its token to a server that asks for one, on loopback without encryption."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.commands import app
from hidream.errors import UnauthenticatedError
from hidream.health import HealthStatus
from tests.clients.conftest import GoTools
from tests.support.live_bridge import running_bridge
from tests.support.live_server import LiveServer, running_server

# The first run builds the Go programs.
pytestmark = pytest.mark.timeout(900)

TOKEN = "token-of-alice-0123456789"
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("secret") / "tokens"
    path.write_text(f"alice {TOKEN}\n", encoding="utf-8")
    with running_server("--tokens-file", str(path)) as server:
        yield server
    assert TOKEN not in server.log


def run(*command: str | Path, token: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HIDREAM_TOKEN"}
    if token is not None:
        environment["HIDREAM_TOKEN"] = token
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


async def test_both_python_clients_bring_their_token(guarded_server: LiveServer) -> None:
    with Client(guarded_server.address, token=TOKEN) as client:
        assert client.info().limits.max_queued_jobs > 0
    async with AsyncClient(guarded_server.address, token=TOKEN) as async_client:
        assert (await async_client.info()).limits.max_queued_jobs > 0


@pytest.mark.parametrize("token", [None, "another-token-0123456789"], ids=["none", "wrong"])
async def test_a_python_client_without_the_token_is_told_so_and_sees_the_health(
    token: str | None, guarded_server: LiveServer
) -> None:
    with Client(guarded_server.address, token=token) as client:
        with pytest.raises(UnauthenticatedError):
            client.info()
        assert client.health() is HealthStatus.SERVING
    async with AsyncClient(guarded_server.address, token=token) as async_client:
        with pytest.raises(UnauthenticatedError):
            await async_client.info()


def test_the_hidream_command_takes_the_token_from_its_flag_or_variable(guarded_server: LiveServer) -> None:
    command = ["info", "--address", guarded_server.address]
    runner = CliRunner(env={"HIDREAM_TOKEN": None})
    by_flag = runner.invoke(app, [*command, "--token", TOKEN])
    by_variable = runner.invoke(app, command, env={"HIDREAM_TOKEN": TOKEN})
    for called in (by_flag, by_variable):
        assert called.exit_code == 0, called.stderr
    refused = runner.invoke(app, command)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == f"hidream: {guarded_server.address}: authorization: Bearer <token> is required\n"


def test_grpcurl_brings_the_token_as_a_header_and_lists_services_without(
    guarded_server: LiveServer, go_tools: GoTools
) -> None:
    grpcurl, method = (go_tools.grpcurl, "-plaintext"), "hidream.v1.ImageGen/GetServerInfo"
    header = ("-H", f"authorization: Bearer {TOKEN}")
    assert run(*grpcurl, *header, guarded_server.address, method).returncode == 0
    refused = run(*grpcurl, guarded_server.address, method)
    assert refused.returncode != 0
    assert "Unauthenticated" in refused.stderr
    assert "TOKEN_MISSING" in refused.stderr
    assert "hidream.v1.ImageGen" in run(*grpcurl, guarded_server.address, "list").stdout


def test_the_go_program_takes_the_token_from_its_variable(
    guarded_server: LiveServer, go_tools: GoTools, tmp_path: Path
) -> None:
    out = tmp_path / "picture.png"
    command = (
        *(go_tools.hidream_generate, "-address", guarded_server.address, "-prompt", PROMPT, "-out", out),
        *("-width", "64", "-height", "64", "-steps", "1"),
    )
    refused = run(*command)
    assert refused.returncode == 1
    assert "Unauthenticated" in refused.stderr
    assert not out.exists()
    drawn = run(*command, token=TOKEN)
    assert drawn.returncode == 0, drawn.stderr
    assert out.exists()


def test_the_http_bridge_passes_the_token_of_each_caller_on(guarded_server: LiveServer) -> None:
    with running_bridge(guarded_server.address) as bridge, bridge.client() as http:
        known = http.get("/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})
        assert known.status_code == 200
        for headers in ({}, {"Authorization": "Bearer another-token-0123456789"}):
            refused = http.get("/v1/jobs", headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["code"] == "UNAUTHENTICATED"
        assert http.get("/readyz").status_code == 200
