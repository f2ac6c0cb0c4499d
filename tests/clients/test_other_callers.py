"""Programs that are not ours, and a client in another language, against the live service."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from google.protobuf import json_format

from hidream.client import Client
from hidream.images import ImageAssembler
from hidream.v1 import image_gen_pb2, server_info_pb2
from tests.clients.conftest import GoTools
from tests.support.live_server import LiveServer

# The first run builds the Go programs.
pytestmark = pytest.mark.timeout(900)

PROMPT = "a red circle on a blue background"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def json_documents(text: str) -> Iterator[str]:
    """The documents of a text that has one after another."""
    decoder = json.JSONDecoder()
    start = 0
    while start < len(text.rstrip()):
        _, end = decoder.raw_decode(text, start)
        yield text[start:end]
        start = end + len(text[end:]) - len(text[end:].lstrip())


def test_grpcurl_finds_the_services_without_proto_files(server: LiveServer, go_tools: GoTools) -> None:
    listed = run(go_tools.grpcurl, "-plaintext", server.address, "list")
    assert {"hidream.v1.ImageGen", "grpc.health.v1.Health"} <= {*listed.stdout.split()}


@pytest.mark.parametrize(
    ("symbol", "line"),
    [
        ("hidream.v1.ImageGen", "rpc Generate ( .hidream.v1.GenerateRequest ) returns ( stream "),
        ("hidream.v1.ImageGen.Generate", "rpc Generate ( .hidream.v1.GenerateRequest ) returns ( stream "),
        ("grpc.health.v1.Health.Check", "rpc Check ( .grpc.health.v1.HealthCheckRequest ) returns ( "),
        ("hidream.v1.GenerateRequest", "  .hidream.v1.ImageSpec spec = 1;"),
        ("hidream.v1.ImageSpec", "  optional int64 seed = 8;"),
    ],
)
def test_grpcurl_describes_the_contract(
    symbol: str, line: str, server: LiveServer, go_tools: GoTools
) -> None:
    described = run(go_tools.grpcurl, "-plaintext", server.address, "describe", symbol)
    assert line in described.stdout, described.stderr


def test_grpcurl_says_that_a_method_is_not_there(server: LiveServer, go_tools: GoTools) -> None:
    described = run(go_tools.grpcurl, "-plaintext", server.address, "describe", "hidream.v1.ImageGen.Draw")
    assert described.returncode != 0
    assert "hidream.v1.ImageGen.Draw" in described.stderr
    assert "not found" in described.stderr.lower()


def test_grpcurl_draws_the_image_that_the_python_client_draws(
    server: LiveServer, client: Client, go_tools: GoTools
) -> None:
    spec = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 2, "seed": "5"}
    called = run(
        *(go_tools.grpcurl, "-plaintext", "-d", json.dumps({"spec": spec})),
        *(server.address, "hidream.v1.ImageGen/Generate"),
    )
    assert called.returncode == 0, called.stderr
    responses = [
        json_format.Parse(document, image_gen_pb2.GenerateResponse())
        for document in json_documents(called.stdout)
    ]
    kinds = [response.event.WhichOneof("event") for response in responses]
    assert kinds.count("progress") == 2
    assert kinds[-1] == "succeeded"
    chunks = [response.event.image_chunk for response in responses if response.event.HasField("image_chunk")]
    assembler = ImageAssembler()
    finished = [image for image in map(assembler.add, chunks) if image]
    assert finished == client.draw(PROMPT, width=64, height=64, num_inference_steps=2, seed=5)


def test_grpcurl_reads_the_limits(server: LiveServer, client: Client, go_tools: GoTools) -> None:
    called = run(go_tools.grpcurl, "-plaintext", server.address, "hidream.v1.ImageGen/GetServerInfo")
    info = json_format.Parse(called.stdout, server_info_pb2.ServerInfo())
    assert info.limits == client.info().limits


@pytest.mark.parametrize("service", ["", "hidream.v1.ImageGen"])
def test_grpc_health_probe_finds_the_service_serving(
    service: str, server: LiveServer, go_tools: GoTools
) -> None:
    probed = run(go_tools.grpc_health_probe, "-addr", server.address, "-service", service)
    assert probed.returncode == 0, probed.stderr
    assert "SERVING" in probed.stdout + probed.stderr


def test_grpc_health_probe_fails_for_a_service_that_is_not_there(
    server: LiveServer, go_tools: GoTools
) -> None:
    probed = run(go_tools.grpc_health_probe, "-addr", server.address, "-service", "hidream.v1.Nothing")
    assert probed.returncode != 0


def test_the_go_program_writes_the_image_that_the_python_client_draws(
    server: LiveServer, client: Client, go_tools: GoTools, tmp_path: Path
) -> None:
    out = tmp_path / "picture.png"
    drawn = run(
        *(
            go_tools.hidream_generate,
            "-address",
            server.address,
            "-prompt",
            PROMPT,
            "-seed",
            "5",
            "-out",
            out,
        ),
        *("-width", "64", "-height", "64", "-steps", "2"),
    )
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.strip() == str(out)
    assert "step 1 of 2" in drawn.stderr
    assert "step 2 of 2" in drawn.stderr
    [image] = client.draw(PROMPT, width=64, height=64, num_inference_steps=2, seed=5)
    assert out.read_bytes() == image.data
    with PIL.Image.open(io.BytesIO(image.data)) as picture:
        assert picture.size == (64, 64)


def test_the_go_program_names_every_bad_field(server: LiveServer, go_tools: GoTools, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    refused = run(
        *(go_tools.hidream_generate, "-address", server.address, "-prompt", "", "-seed", "-1", "-out", out)
    )
    assert refused.returncode == 1
    assert "  spec.prompt: " in refused.stderr
    assert "  spec.seed: " in refused.stderr
    assert not out.exists()
