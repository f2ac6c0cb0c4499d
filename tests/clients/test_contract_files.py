"""`protos/` by itself, and the programs of docs/clients.md: what a caller in any language begins with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import json_format

from hidream.client import Client
from hidream.v1 import server_info_pb2
from tests.clients.conftest import PROJECT, GoTools, run_script
from tests.support.live_server import LiveServer

# The first run builds the Go programs and installs the packages of Node.
pytestmark = pytest.mark.timeout(900)

PROTOS = PROJECT / "protos"
SERVICE_FILE = "hidream/v1/image_gen.proto"
PAGE = (PROJECT / "docs" / "clients.md").read_text()
PAGE_ADDRESS = "localhost:8088"


def run(*command: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def program_of_page(language: str) -> str:
    """The one program of docs/clients.md in this language."""
    [program] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return program


@pytest.fixture
def circle(client: Client) -> bytes:
    """The image that every program of docs/clients.md asks for."""
    [image] = client.draw("a red circle on a blue background", seed=7)
    return image.data


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
        server.address,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout)["statusCodeDistribution"] == {"OK": 2}


def test_the_node_program_writes_the_image_that_the_python_client_draws(
    server: LiveServer, circle: bytes, node_example: Path, tmp_path: Path
) -> None:
    drawn = run("node", node_example, server.address, folder=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "step 1 of " in drawn.stdout
    assert (tmp_path / "circle.png").read_bytes() == circle


def test_the_page_shows_the_node_program(node_example: Path) -> None:
    assert program_of_page("js") == node_example.read_text()


def test_the_python_program_of_the_page_writes_its_image(
    server: LiveServer, circle: bytes, tmp_path: Path
) -> None:
    program = program_of_page("python").replace(PAGE_ADDRESS, server.address)
    drawn = run(sys.executable, "-c", program, folder=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "step 1 of " in drawn.stdout
    assert (tmp_path / "circle.png").read_bytes() == circle


def test_the_go_program_of_the_page_writes_its_image(
    server: LiveServer, circle: bytes, go_tools: GoTools, tmp_path: Path
) -> None:
    source, binary = tmp_path / "main.go", tmp_path / "circle"
    source.write_text(program_of_page("go").replace(PAGE_ADDRESS, server.address))
    built = run_script(
        "go.sh", "-C", str(PROJECT / "clients" / "go"), "build", "-o", str(binary), str(source)
    )
    assert built.returncode == 0, built.stdout
    drawn = run(binary, folder=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "step 1 of " in drawn.stdout
    assert (tmp_path / "circle.png").read_bytes() == circle
