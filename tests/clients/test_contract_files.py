"""`protos/` by itself is enough to call the service, and a server without it too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format

from hidream.client import Client
from hidream.v1 import server_info_pb2
from tests.clients.conftest import PROJECT, GoTools
from tests.support.live_server import LiveServer

# The first run builds the Go programs.
pytestmark = pytest.mark.timeout(900)

PROTOS = PROJECT / "protos"
SERVICE_FILE = "hidream/v1/image_gen.proto"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_protos_build_without_other_files() -> None:
    built = run(Path(sys.executable).parent / "buf", "build", PROTOS)
    assert built.returncode == 0, built.stderr


def test_grpcurl_calls_with_the_proto_files_alone(
    server: LiveServer, client: Client, go_tools: GoTools
) -> None:
    called = run(
        *(go_tools.grpcurl, "-plaintext", "-import-path", PROTOS, "-proto", SERVICE_FILE),
        *(server.address, "hidream.v1.ImageGen/GetServerInfo"),
    )
    assert called.returncode == 0, called.stderr
    info = json_format.Parse(called.stdout, server_info_pb2.ServerInfo())
    assert info.limits == client.info().limits


def test_grpcurl_shows_every_bad_field_with_the_proto_files_alone(
    server: LiveServer, go_tools: GoTools
) -> None:
    refused = run(
        *(go_tools.grpcurl, "-plaintext", "-import-path", PROTOS, "-proto", SERVICE_FILE),
        *("-proto", "google/rpc/error_details.proto", "-d", '{"spec": {"seed": -1}}'),
        *(server.address, "hidream.v1.ImageGen/SubmitJob"),
    )
    assert "Code: InvalidArgument" in refused.stderr
    for field in ("spec.prompt", "spec.seed"):
        assert f'"field": "{field}"' in refused.stderr


@pytest.mark.parametrize(
    "contract",
    [
        pytest.param(("--proto", PROTOS / SERVICE_FILE, "--import-paths", PROTOS), id="proto files"),
        pytest.param((), id="reflection"),
    ],
)
def test_ghz_loads_the_service(
    contract: tuple[str | Path, ...], server: LiveServer, go_tools: GoTools
) -> None:
    spec = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 1}
    loaded = run(
        *(go_tools.ghz, "--insecure", *contract, "--call", "hidream.v1.ImageGen.Generate"),
        *("--data", json.dumps({"spec": spec}), "--total", "2", "--concurrency", "2", "--format", "json"),
        *("--timeout", "0", "--connect-timeout", "120s"),
        server.address,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout)["statusCodeDistribution"] == {"OK": 2}
