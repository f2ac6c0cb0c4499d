"""The bridge over TLS: who may connect, and certificates that are replaced while streams are open."""

from __future__ import annotations

import asyncio
import base64
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from hidream.certificate_names import FORWARDED_NAME
from hidream.v1 import image_gen_pb2
from hidream_http.settings import SettingError, Settings, TlsFiles
from hidream_http.tls import ListenerTls, name_of_caller
from tests.support.certificates import CertificateFiles, authority_file, certificate_files
from tests.support.job_calls import Stub, not_found
from tests.support.live_bridge import LiveBridge, running_bridge
from tests.support.live_server import LiveServer

ALICE = "alice@example.org"
BOB = "bob.example.org"
NUM_STREAMS = 50
STREAM_TIMEOUT_SECONDS = 120
JOB = {"spec": {"prompt": "a fox", "width": 64, "height": 64, "numInferenceSteps": 1}}


@dataclass(frozen=True)
class SecuredBridge:
    """A bridge that asks callers for a certificate, and the files of both."""

    bridge: LiveBridge
    authority: trustme.CA
    files: CertificateFiles
    ca: Path
    alice: CertificateFiles
    bob: CertificateFiles

    @property
    def port(self) -> int:
        return int(self.bridge.url.rpartition(":")[2])

    def context(self, caller: CertificateFiles | None) -> ssl.SSLContext:
        """What a caller connects with."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if caller is not None:
            context.load_cert_chain(caller.certificate, caller.key)
        return context

    def shown_certificate(self) -> bytes:
        """What the bridge shows a new connection."""
        with (
            socket.create_connection(("127.0.0.1", self.port), 10) as plain,
            self.context(self.alice).wrap_socket(plain, server_hostname="127.0.0.1") as encrypted,
        ):
            shown = encrypted.getpeercert(binary_form=True)
            assert shown is not None
            return shown


def der(issued: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())


@pytest.fixture(scope="module")
def secured(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredBridge]:
    folder = tmp_path_factory.mktemp("https")
    authority = trustme.CA()
    ca = authority_file(folder, authority)
    files = certificate_files(folder, "bridge", authority.issue_cert("127.0.0.1"))
    alice = certificate_files(folder, "alice", authority.issue_cert(ALICE, common_name="not-her"))
    bob = certificate_files(folder, "bob", authority.issue_cert(BOB))
    tls = TlsFiles(files.certificate, files.key, ca)
    with running_bridge(server.address, Settings(tls=tls)) as bridge:
        yield SecuredBridge(bridge, authority, files, ca, alice, bob)


def test_a_caller_with_a_certificate_is_answered_over_https(secured: SecuredBridge) -> None:
    with secured.bridge.client(verify=secured.context(secured.alice)) as http:
        assert http.get("/readyz").status_code == 200


def test_a_caller_without_a_certificate_of_the_authority_is_not_connected(
    secured: SecuredBridge, tmp_path: Path
) -> None:
    stranger = certificate_files(tmp_path, "stranger", trustme.CA().issue_cert("alice@example.org"))
    for caller in (None, stranger):
        with (
            secured.bridge.client(verify=secured.context(caller)) as http,
            pytest.raises(httpx.TransportError),
        ):
            http.get("/readyz")


def submit(http: httpx.Client) -> str:
    answer = http.post("/v1/jobs", json=JOB)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["jobId"])


def listed(http: httpx.Client) -> set[str]:
    return {job["jobId"] for job in http.get("/v1/jobs").json().get("jobs", ())}


def forged(name: str) -> dict[str, str]:
    """What gRPC would send for a name, as a header of HTTP."""
    return {FORWARDED_NAME: base64.b64encode(name.encode()).decode()}


def test_callers_are_named_by_their_certificates_and_each_sees_its_own_jobs(
    secured: SecuredBridge, server: LiveServer, stub: Stub
) -> None:
    with (
        secured.bridge.client(verify=secured.context(secured.alice)) as hers,
        secured.bridge.client(verify=secured.context(secured.bob)) as his,
    ):
        her_job, his_job = submit(hers), submit(his)
        assert (listed(hers) & {her_job, his_job}, listed(his)) == ({her_job}, {his_job})
        for http, own, other in ((hers, her_job, his_job), (his, his_job, her_job)):
            assert http.get(f"/v1/jobs/{own}").status_code == 200
            assert http.get(f"/v1/jobs/{other}").status_code == 404
            assert http.post(f"/v1/jobs/{other}:cancel", json={}).status_code == 404
        server.logged_lines("SubmitJob OK", f"caller={ALICE}", f"job_id={her_job}")
        server.logged_lines("SubmitJob OK", f"caller={BOB}", f"job_id={his_job}")
    # Who calls without a certificate owns neither.
    not_found(lambda: stub.GetJob(image_gen_pb2.GetJobRequest(job_id=her_job)))
    # The name is the same one that the server itself would read.
    named = ((FORWARDED_NAME, ALICE.encode()),)
    assert stub.GetJob(image_gen_pb2.GetJobRequest(job_id=her_job), metadata=named).job_id == her_job


def test_no_header_of_http_gives_a_caller_the_name_of_another_one(
    secured: SecuredBridge, bridge: LiveBridge
) -> None:
    with secured.bridge.client(verify=secured.context(secured.alice)) as hers:
        job_id = submit(hers)
        assert hers.get(f"/v1/jobs/{job_id}", headers=forged(BOB)).status_code == 200
    with secured.bridge.client(verify=secured.context(secured.bob)) as his, bridge.client() as unnamed:
        for http in (his, unnamed):
            answer = http.get(f"/v1/jobs/{job_id}", headers=forged(ALICE))
            assert answer.status_code == 404


def test_a_certificate_without_a_name_is_refused_as_the_server_refuses_it(secured: SecuredBridge) -> None:
    # That of the bridge has an IP address alone.
    with secured.bridge.client(verify=secured.context(secured.files)) as http:
        answer = http.get("/v1/jobs")
        assert (answer.status_code, answer.json()["code"]) == (401, "UNAUTHENTICATED")
        assert answer.json()["details"][0]["reason"] == "CERTIFICATE_WITHOUT_NAME"
        assert http.get("/healthz").status_code == 200


def test_a_certificate_is_read_by_the_rule_of_the_server() -> None:
    # As Python's ssl gives them.
    subject = ((("organizationName", "Example"),), (("commonName", "Jürgen"),))
    uri, email, dns = ("URI", "spiffe://example.org/a"), ("email", "a@example.org"), ("DNS", "a.test")
    for alternatives, name in (
        ((("IP Address", "10.0.0.1"), ("DNS", "b.test"), dns, email, uri), "spiffe://example.org/a"),
        ((dns, email), "a@example.org"),
        ((("DirName", subject), dns), "a.test"),
        ((("IP Address", "10.0.0.1"),), "Jürgen"),
    ):
        read = name_of_caller({"subject": subject, "subjectAltName": alternatives})
        assert read.decode() == name
    assert name_of_caller({"subject": subject[:1]}) == b""


async def test_a_certificate_is_replaced_under_open_streams(
    secured: SecuredBridge, caplog: pytest.LogCaptureFixture
) -> None:
    new = secured.authority.issue_cert("127.0.0.1")
    limits = httpx.Limits(max_connections=None)
    async with (
        AsyncExitStack() as streams,
        secured.bridge.async_client(verify=secured.context(secured.alice), limits=limits) as http,
        asyncio.timeout(STREAM_TIMEOUT_SECONDS),
    ):
        watch = ("GET", "/v1/jobs:watch?labels[test]=replaced")
        opening = (streams.enter_async_context(http.stream(*watch)) for _ in range(NUM_STREAMS))
        answers = await asyncio.gather(*opening)
        secured.files.write(new)
        assert await asyncio.to_thread(secured.shown_certificate) == der(new)
        submitted = await http.post("/v1/jobs", json={**JOB, "labels": {"test": "replaced"}})
        job_id = submitted.json()["jobId"]
        for answer in answers:
            assert job_id in await anext(answer.aiter_lines())

        # Half a change and a broken one change nothing.
        caplog.set_level(logging.ERROR, "hidream_http.tls")
        secured.files.key.write_text("no key")
        for _ in range(2):
            assert await asyncio.to_thread(secured.shown_certificate) == der(new)
        assert [record.name for record in caplog.records].count("hidream_http.tls") == 1
        secured.files.write(new)


def test_an_authority_that_is_replaced_lets_nobody_of_the_former_in(
    secured: SecuredBridge, tmp_path: Path
) -> None:
    former, other = secured.ca.read_bytes(), trustme.CA()
    bob = certificate_files(tmp_path, "bob", other.issue_cert("bob@example.org"))
    with secured.bridge.client(verify=secured.context(secured.alice)) as http:
        assert http.get("/readyz").status_code == 200
        trusting, hers = secured.context(bob), secured.context(secured.alice)
        secured.ca.write_bytes(other.cert_pem.bytes())
        try:
            # An open connection goes on.
            assert http.get("/healthz").status_code == 200
            with secured.bridge.client(verify=trusting) as his:
                assert his.get("/healthz").status_code == 200
            with secured.bridge.client(verify=hers) as late, pytest.raises(httpx.TransportError):
                late.get("/healthz")
        finally:
            secured.ca.write_bytes(former)


def test_wrong_certificates_are_named_by_their_flag(tmp_path: Path) -> None:
    authority = trustme.CA()
    good = certificate_files(tmp_path, "good", authority.issue_cert("localhost"))
    other = certificate_files(tmp_path, "other", authority.issue_cert("localhost"))
    text = tmp_path / "text"
    text.write_text("no certificate")
    for files, line in (
        (TlsFiles(tmp_path / "none", good.key), f"--tls-certificate: {tmp_path}/none: No such file"),
        (TlsFiles(tmp_path, good.key), f"--tls-certificate: {tmp_path}: is no regular file"),
        (TlsFiles(text, good.key), f"--tls-certificate: {text}: holds no certificate"),
        (TlsFiles(good.certificate, other.key), f"--tls-key: {other.key}: is not the key of the first"),
        (TlsFiles(good.certificate, text), f"--tls-key: {text}: holds no private key"),
        (TlsFiles(good.certificate, good.key, text), f"--tls-client-ca: {text}: holds no certificate"),
    ):
        with pytest.raises(SettingError) as refused:
            ListenerTls(files)
        assert str(refused.value).startswith(line)
