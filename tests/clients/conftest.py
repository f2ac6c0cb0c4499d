from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from hidream.client import Client
from hidream.connection import SERVICE_NAME
from tests.support.live_server import LiveServer

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def client(server: LiveServer) -> Iterator[Client]:
    """A client of the shared server."""
    with Client(server.address) as client:
        yield client


@dataclass(frozen=True)
class GoTools:
    """Programs in Go that call a server."""

    grpcurl: Path
    ghz: Path
    grpc_health_probe: Path
    hidream_generate: Path
    hidream_jobs: Path


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One of scripts/, which finds the Go of the test extra too; its output is in `stdout`."""
    return subprocess.run(
        [PROJECT / "scripts" / name, *arguments],
        env={**os.environ, "PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def go_tools() -> GoTools:
    """What scripts/install_go_tools.sh builds; without Go the test skips, in CI it fails."""
    installed = run_script("install_go_tools.sh")
    assert installed.returncode == 0, installed.stdout
    folder = PROJECT / ".cache" / "go" / "bin"
    if run_script("go.sh", "version").returncode != 0:
        pytest.skip(installed.stdout.strip())
    return GoTools(
        *(
            folder / name
            for name in ("grpcurl", "ghz", "grpc-health-probe", "hidream-generate", "hidream-jobs")
        )
    )


@pytest.fixture(scope="session")
def node_example() -> Path:
    """The program in clients/node, with its packages; without Node the test skips, in CI it fails."""
    installed = run_script("install_node_packages.sh")
    assert installed.returncode == 0, installed.stdout
    folder = PROJECT / "clients" / "node"
    if not (folder / "node_modules").exists():
        pytest.skip(installed.stdout.strip())
    return folder / "generate.mjs"


# Of the small image that programs of the documentation ask for here: what follows their seed there.
STEPS = 4
SMALL: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": STEPS}


def changed(program: str, old: str, new: str) -> str:
    """A program with another text at one place, which it has."""
    assert program.count(old) == 1
    return program.replace(old, new)


def small_node_program(program: Path, folder: Path) -> Path:
    """A copy of a program of clients/node that asks for a small image, beside packages and contract."""
    copy = folder / "clients" / "node" / program.name
    copy.parent.mkdir(parents=True)
    (copy.parent / "node_modules").symlink_to(program.parent / "node_modules")
    (folder / "protos").symlink_to(PROJECT / "protos")
    small = f"width: 64, height: 64, numInferenceSteps: {STEPS}"
    copy.write_text(changed(program.read_text(), "spec: { prompt:", f"spec: {{ {small}, prompt:"))
    return copy


class HealthOnlyServer:
    """A real gRPC server that only tells its health, which the test decides."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=4)
        self._health = health.HealthServicer()
        self._server = grpc.server(self._threads, options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self.is_serving = False

    @property
    def is_serving(self) -> bool:
        return self._is_serving

    @is_serving.setter
    def is_serving(self, is_serving: bool) -> None:
        self._is_serving = is_serving
        status = health_pb2.HealthCheckResponse.ServingStatus
        self._health.set(SERVICE_NAME, status.SERVING if is_serving else status.NOT_SERVING)

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown()


@pytest.fixture
def health_only_server() -> Iterator[HealthOnlyServer]:
    """Not serving, and its port bound but not answered, until the test changes that."""
    server = HealthOnlyServer()
    yield server
    server.stop()


@pytest.fixture
def closed_address() -> Iterator[str]:
    """An address that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"
