"""Every client over mutual TLS against one server, whose certificate is replaced while streams are open."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from typer.testing import CliRunner

from hidream.client import Client
from hidream.commands import app
from hidream.connection import Tls
from hidream.errors import UnavailableError
from hidream.health import HealthStatus
from hidream.v1 import image_gen_pb2, image_gen_pb2_grpc
from hidream_http.settings import Settings
from tests.clients.conftest import GoTools
from tests.support.certificates import CertificateFiles, authority_file, certificate_files
from tests.support.job_calls import not_found
from tests.support.live_bridge import running_bridge
from tests.support.live_server import START_TIMEOUT_SECONDS, LiveServer, running_server, wait_until
from tests.support.streams import follow, request

# The first run builds the Go programs.
pytestmark = pytest.mark.timeout(900)

ALICE = "alice@example.org"
BOB = "bob.example.org"
NUM_STREAMS = 50
# That a stream which hears nothing fails, however busy the cores are.
STREAM_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class SecuredServer:
    """A server that names callers by their certificates, and the files that its callers have."""

    server: LiveServer
    authority: trustme.CA
    files: CertificateFiles
    ca: Path
    alice: CertificateFiles
    bob: CertificateFiles

    @property
    def address(self) -> str:
        """With a name that the certificate of the server has."""
        return f"localhost:{self.server.address.rpartition(':')[2]}"

    def tls(self, caller: CertificateFiles) -> Tls:
        return Tls(self.ca.read_bytes(), caller.key.read_bytes(), caller.certificate.read_bytes())

    def channel(self, caller: CertificateFiles) -> grpc.Channel:
        """A connection of its own."""
        credentials = self.tls(caller).credentials()
        return grpc.secure_channel(self.address, credentials, [("grpc.use_local_subchannel_pool", 1)])

    def shown_certificate(self) -> bytes:
        """What the server shows a new connection."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.alice.certificate, self.alice.key)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as encrypted,
        ):
            shown = encrypted.getpeercert(binary_form=True)
            assert shown is not None
            return shown


def der(issued: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredServer]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    ca = authority_file(folder, authority)
    files = certificate_files(folder, "server", authority.issue_cert("localhost"))
    alice = certificate_files(folder, "alice", authority.issue_cert(ALICE, common_name="not-her"))
    bob = certificate_files(folder, "bob", authority.issue_cert(BOB))
    flags = {"--tls-certificate": files.certificate, "--tls-key": files.key, "--tls-client-ca": ca}
    words = (str(word) for flag in flags.items() for word in flag)
    with running_server(*words, "--metrics-port", "0", "--grace-seconds", "5", wait=False) as server:
        secured = SecuredServer(server, authority, files, ca, alice, bob)
        with Client(secured.address, tls=secured.tls(alice)) as client:
            client.wait_until_serving(timeout_seconds=START_TIMEOUT_SECONDS)
        yield secured


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_python_is_named_by_its_certificate_and_has_jobs_of_its_own(secured: SecuredServer) -> None:
    with secured.channel(secured.alice) as hers, secured.channel(secured.bob) as his:
        stub, other = image_gen_pb2_grpc.ImageGenStub(hers), image_gen_pb2_grpc.ImageGenStub(his)
        job_id = follow(stub.Generate(request(num_inference_steps=1))).job.job_id
        asked = image_gen_pb2.GetJobRequest(job_id=job_id)
        assert stub.GetJob(asked).job_id == job_id
        assert not_found(lambda: other.GetJob(asked)).resource_name == job_id
    secured.server.logged_lines("Generate OK", f"caller={ALICE}", f"job_id={job_id}")
    secured.server.logged_lines("GetJob NOT_FOUND", f"caller={BOB}")


def test_who_has_no_certificate_or_that_of_a_stranger_is_not_connected(
    secured: SecuredServer, tmp_path: Path
) -> None:
    stranger = certificate_files(tmp_path, "stranger", trustme.CA().issue_cert(ALICE))
    for tls in (Tls(secured.ca.read_bytes()), secured.tls(stranger), None):
        with Client(secured.address, tls=tls) as client, pytest.raises(UnavailableError):
            client.health()


def test_the_hidream_command_takes_the_three_files(secured: SecuredServer) -> None:
    own = ("--cert-file", secured.alice.certificate, "--key-file", secured.alice.key)
    command = ("info", "--address", secured.address, "--ca-file", secured.ca, *own)
    called = CliRunner().invoke(app, [str(word) for word in command])
    assert called.exit_code == 0, called.stderr


def test_grpcurl_takes_the_three_files(secured: SecuredServer, go_tools: GoTools) -> None:
    own = ("-cert", secured.bob.certificate, "-key", secured.bob.key)
    method = "hidream.v1.ImageGen/ListJobs"
    called = run(go_tools.grpcurl, "-cacert", secured.ca, *own, secured.address, method)
    assert called.returncode == 0, called.stderr
    assert run(go_tools.grpcurl, "-cacert", secured.ca, secured.address, method).returncode != 0


def test_grpc_health_probe_takes_the_three_files(secured: SecuredServer, go_tools: GoTools) -> None:
    own = ("-tls-client-cert", secured.bob.certificate, "-tls-client-key", secured.bob.key)
    probed = run(
        go_tools.grpc_health_probe, "-addr", secured.address, "-tls", "-tls-ca-cert", secured.ca, *own
    )
    assert probed.returncode == 0, probed.stderr


def test_the_go_program_takes_the_three_files(secured: SecuredServer, go_tools: GoTools) -> None:
    own = ("-cert-file", secured.bob.certificate, "-key-file", secured.bob.key)
    command = (go_tools.hidream_jobs, "-address", secured.address, "-ca-file", secured.ca)
    listed = run(*command, *own, "list")
    assert listed.returncode == 0, listed.stderr
    alone = run(*command, *own[:2], "list")
    assert alone.returncode != 0
    assert "-cert-file and -key-file are given together" in alone.stderr


def test_the_metrics_stay_plain(secured: SecuredServer) -> None:
    with socket.create_connection(("127.0.0.1", secured.server.metrics_port), 10) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert connection.makefile("rb").readline().split()[1] == b"200"


def test_new_connections_see_a_new_certificate_and_open_streams_go_on(secured: SecuredServer) -> None:
    with ExitStack() as open_channels:
        with Client(secured.address, tls=secured.tls(secured.alice)) as client:
            older = client.submit("a red circle", width=64, height=64, num_inference_steps=1)
        watches = []
        for _ in range(NUM_STREAMS):
            stub = image_gen_pb2_grpc.ImageGenStub(
                open_channels.enter_context(secured.channel(secured.alice))
            )
            watch = stub.WatchJobs(image_gen_pb2.WatchJobsRequest(), timeout=STREAM_TIMEOUT_SECONDS)
            assert any(response.job.job_id == older.job_id for response in watch)
            watches.append(watch)
        replacement = secured.authority.issue_cert("localhost")
        assert secured.shown_certificate() != der(replacement)
        secured.files.write(replacement)
        wait_until(
            lambda: secured.shown_certificate() == der(replacement), 10, "the new certificate is shown"
        )
        # A half-written file changes nothing for those who connect.
        secured.files.certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
        assert secured.shown_certificate() == der(replacement)
        secured.server.logged_lines("holds no certificate in PEM", "the certificates stay as they were")
        secured.files.write(replacement)
        with Client(secured.address, tls=secured.tls(secured.alice)) as client:
            assert client.health() is HealthStatus.SERVING
            job = client.submit("a red circle", width=64, height=64, num_inference_steps=1)
        for watch in watches:
            assert any(response.job.job_id == job.job_id for response in watch)
            watch.cancel()


def test_the_http_bridge_calls_over_mutual_tls(secured: SecuredServer) -> None:
    num_lines = len(secured.server.log_lines)
    for tls, status in ((secured.tls(secured.alice), 200), (Tls(secured.ca.read_bytes()), 503)):
        with running_bridge(secured.address, Settings(server_tls=tls)) as bridge, bridge.client() as http:
            assert http.get("/v1/jobs").status_code == status
    secured.server.logged_lines("ListJobs OK", f"caller={ALICE}", after=num_lines)
