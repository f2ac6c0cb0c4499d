"""Callers of gRPC through Envoy, with the configuration that is in deploy/."""

from __future__ import annotations

from pathlib import Path

import trustme

from hidream.client import Client
from hidream.connection import Tls
from tests.support.certificates import certificate_files
from tests.support.envoy import running_envoy
from tests.support.live_server import LiveServer

DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIGURATION = DEPLOY / "envoy.yaml"


def test_one_address_with_tls_and_one_without_lead_to_the_server(server: LiveServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = certificate_files(tmp_path, "envoy", authority.issue_cert("localhost"))
    files = {"/etc/envoy/tls/tls.crt": issued.certificate, "/etc/envoy/tls/tls.key": issued.key}
    tls = Tls(root_certificates=authority.cert_pem.bytes())
    with running_envoy(CONFIGURATION, [server.address], tmp_path, files) as envoy:
        for name, encryption in (("grpc_tls", tls), ("grpc_plaintext", None)):
            with Client(f"localhost:{envoy.ports[name]}", tls=encryption) as client:
                image = client.draw("a red circle", width=64, height=64, num_inference_steps=1)[0]
                assert image.mime_type == "image/png"


def test_the_manifests_of_kubernetes_have_the_same_envoy() -> None:
    inside = (DEPLOY / "kubernetes" / "envoy" / "envoy.yaml").read_text(encoding="utf-8")
    assert inside == CONFIGURATION.read_text(encoding="utf-8")
