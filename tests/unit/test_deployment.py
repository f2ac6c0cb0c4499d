"""What `deploy/` says agrees with the service: its settings, the time that it takes to end, its ports."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from alembic.script import ScriptDirectory

from hidream_grpc.jobs.store import migrate
from hidream_grpc.settings import VARIABLES_OF_CLIENTS, Settings
from hidream_http.command import app as bridge_command
from hidream_http.settings import Settings as BridgeSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
GRACE_SECONDS = Settings.model_fields["grace_seconds"].default
END_SECONDS = (
    4  # docs/operations.md: after the grace period, stores that do not answer are left after so long
)


def documents(path: str) -> Iterator[Any]:
    return yaml.safe_load_all((DEPLOY / path).read_text(encoding="utf-8"))


def server_pod() -> Any:
    (deployment,) = documents("kubernetes/base/deployment.yaml")
    return deployment["spec"]["template"]["spec"]


def test_every_variable_of_the_deployment_files_is_a_setting() -> None:
    settings = {f"HIDREAM_{name.upper()}" for name in Settings.model_fields} | VARIABLES_OF_CLIENTS
    settings |= {str(flag.envvar) for flag in typer.main.get_command(bridge_command).params}
    named = {
        (path.relative_to(DEPLOY), name)
        for path in DEPLOY.rglob("*")
        if path.is_file()
        for name in re.findall(r"\bHIDREAM_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert {(path, name) for path, name in named if name not in settings} == set()


def test_a_pod_has_the_time_that_draining_takes() -> None:
    pod = server_pod()
    (container,) = pod["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    drain_seconds = float(variables["HIDREAM_DRAIN_DELAY_SECONDS"]) + float(
        variables["HIDREAM_GRACE_SECONDS"]
    )
    assert pod["terminationGracePeriodSeconds"] > drain_seconds + END_SECONDS


@pytest.mark.parametrize(
    ("path", "pattern"),
    [
        pytest.param("systemd/hidream-grpc.service", r"^TimeoutStopSec=(\d+)$", id="systemd"),
        pytest.param("observability/compose.yaml", r"^ *stop_grace_period: (\d+)s$", id="compose"),
        pytest.param("Dockerfile", r"docker run .*--stop-timeout (\d+)", id="docker"),
    ],
)
def test_whoever_stops_the_server_gives_it_the_time_that_draining_takes(path: str, pattern: str) -> None:
    text = (DEPLOY / path).read_text(encoding="utf-8")
    stop_seconds = [int(seconds) for seconds in re.findall(pattern, text, re.MULTILINE)]
    assert stop_seconds
    assert min(stop_seconds) > GRACE_SECONDS + END_SECONDS


def test_systemd_gives_the_bridge_the_time_that_draining_takes() -> None:
    unit = (DEPLOY / "systemd" / "hidream-http.service").read_text(encoding="utf-8")
    (stop_seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop_seconds) > BridgeSettings().drain_seconds + END_SECONDS


def test_systemd_does_not_show_the_bridge_the_secrets_of_the_server() -> None:
    of_server, of_bridge = (
        re.findall(
            r"^EnvironmentFile=-?(\S+)$",
            (DEPLOY / "systemd" / unit).read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        for unit in ("hidream-grpc.service", "hidream-http.service")
    )
    assert of_bridge
    assert not set(of_bridge) & set(of_server)


def test_a_pod_runs_without_rights_that_it_does_not_need() -> None:
    pod = server_pod()
    assert pod["automountServiceAccountToken"] is False
    context = pod["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 10001
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_ports_of_services_and_monitors_are_those_of_the_server() -> None:
    (container,) = server_pod()["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8088, "metrics": 9090}
    (service,) = documents("kubernetes/base/service.yaml")
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == ports
    assert {port["targetPort"] for port in service["spec"]["ports"]} == set(ports)
    (monitor,) = documents("kubernetes/monitoring/service-monitor.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == ["metrics"]
    (policy,) = documents("kubernetes/network-policy/network-policy.yaml")
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert opened == set(ports)


def test_the_files_that_compose_mounts_are_there() -> None:
    (compose,) = documents("observability/compose.yaml")
    mounted = [
        volume.partition(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert mounted
    assert [path for path in mounted if not (DEPLOY / "observability" / path).exists()] == []


def test_the_note_on_upgrades_names_the_schema_of_this_version() -> None:
    rows = re.findall(
        r"^\| (\d+\.\d+\.\d+) \| (\d{4}) \|$", (DEPLOY / "README.md").read_text("utf-8"), re.MULTILINE
    )
    head = ScriptDirectory.from_config(migrate._config()).get_current_head()
    assert dict(rows)[importlib.metadata.version("hidream-grpc")] == head
