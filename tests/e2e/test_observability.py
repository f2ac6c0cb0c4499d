"""The alerts, the dashboard and the autoscaler ask for what the server measures."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc
from scripts.dashboard_rules import expressions
from tests.support.live_server import LiveServer
from tests.support.prometheus_samples import scrape

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def asked_of_prometheus() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "observability" / "rules.yml").read_text(encoding="utf-8"))
    scaled_object = yaml.safe_load(
        (DEPLOY / "kubernetes" / "autoscaling" / "scaled-object.yaml").read_text(encoding="utf-8")
    )
    return [
        *(rule["expr"] for group in rules["groups"] for rule in group["rules"]),
        *(trigger["metadata"]["query"] for trigger in scaled_object["spec"]["triggers"]),
        *expressions(),
    ]


def test_every_metric_that_alerts_dashboard_and_autoscaler_ask_for_is_served(
    server: LiveServer, stub: image_gen_pb2_grpc.ImageGenStub
) -> None:
    # The metrics of calls have no samples before the first one.
    stub.GetServerInfo(image_gen_pb2.GetServerInfoRequest())
    asked = {
        name for text in asked_of_prometheus() for name in re.findall(r"\b(?:hidream|process)_\w+", text)
    }
    assert len(asked) > 20
    assert asked - {name for name, _ in scrape(server)} == set()
