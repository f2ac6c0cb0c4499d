"""The files of TLS: what is wrong with them, when they are read again, and what connections then have."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from hidream_grpc.errors import ConfigurationError, UnauthenticatedError
from hidream_grpc.server.call import Call
from hidream_grpc.server.callers import CallerIdentification, name_in_certificate
from hidream_grpc.server.listening import bind
from hidream_grpc.server.tls import ServerTls, TlsFiles, tls_files
from tests.support.certificates import CertificateFiles, authority_file, certificate_files
from tests.support.refused_starts import refused_line_here

AUTHORITY = trustme.CA()
OTHER_AUTHORITY = trustme.CA()
ISSUED = AUTHORITY.issue_cert("localhost")
REISSUED = AUTHORITY.issue_cert("localhost")


@pytest.fixture
def server_files(tmp_path: Path) -> CertificateFiles:
    return certificate_files(tmp_path, "server", ISSUED)


def files_of(server_files: CertificateFiles, client_ca: Path | None = None) -> TlsFiles:
    return TlsFiles(server_files.certificate, server_files.key, client_ca)


@pytest.mark.parametrize(
    ("flag", "content", "line"),
    [
        pytest.param("certificate", None, "--tls-certificate: FILE: No such file or directory", id="absent"),
        pytest.param(
            "certificate",
            b"prose",
            "--tls-certificate: FILE: holds no certificate in PEM, or a broken one",
            id="prose",
        ),
        pytest.param(
            "certificate",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "--tls-certificate: FILE: holds no certificate in PEM, or a broken one",
            id="broken certificate",
        ),
        pytest.param(
            "key", b"", "--tls-key: FILE: holds no private key in PEM, or a broken one", id="empty key"
        ),
        pytest.param(
            "key",
            REISSUED.private_key_pem.bytes(),
            "--tls-key: FILE: is not the key of the first certificate of --tls-certificate",
            id="another key",
        ),
        pytest.param(
            "client_ca",
            b"\xff",
            "--tls-client-ca: FILE: holds no certificate in PEM, or a broken one",
            id="authority",
        ),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(
    flag: str, content: bytes | None, line: str, server_files: CertificateFiles, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    if content is not None:
        wrong.write_bytes(content)
    paths = {"certificate": server_files.certificate, "key": server_files.key, "client_ca": None, flag: wrong}
    with pytest.raises(ConfigurationError) as refused:
        ServerTls(TlsFiles(**paths))  # type: ignore[arg-type]
    assert str(refused.value) == line.replace("FILE", str(wrong))


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(
    server_files: CertificateFiles,
) -> None:
    key = serialization.load_pem_private_key(ISSUED.private_key_pem.bytes(), None)
    server_files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigurationError, match="has a passphrase"):
        ServerTls(files_of(server_files))


def test_a_server_with_a_wrong_file_does_not_start(server_files: CertificateFiles) -> None:
    server_files.key.write_text("prose", encoding="utf-8")
    line = refused_line_here(["--tls-certificate", server_files.certificate, "--tls-key", server_files.key])
    reason = "holds no private key in PEM, or a broken one"
    assert line == f"hidream-grpc: --tls-key: {server_files.key}: {reason}"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("certificate", "--tls-certificate: needs --tls-key"),
        ("key", "--tls-key: needs --tls-certificate"),
        ("client_ca", "--tls-client-ca: needs --tls-certificate and --tls-key"),
    ],
)
def test_a_flag_without_the_ones_that_it_needs_is_refused(given: str, line: str) -> None:
    paths = {"certificate": None, "key": None, "client_ca": None, given: Path("a.pem")}
    with pytest.raises(ConfigurationError) as refused:
        tls_files(**paths)  # type: ignore[arg-type]
    assert str(refused.value) == line


def test_files_that_change_are_read_again_and_wrong_ones_change_nothing(
    server_files: CertificateFiles, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ServerTls(files_of(server_files))
    assert tls.changed_configuration() is None
    server_files.certificate.write_bytes(REISSUED.cert_chain_pems[0].bytes())
    assert tls.changed_configuration() is tls.changed_configuration() is None
    (complaint,) = caplog.messages
    assert complaint.endswith("; the certificates stay as they were")
    server_files.key.write_bytes(REISSUED.private_key_pem.bytes())
    assert tls.changed_configuration() is not None
    assert tls.changed_configuration() is None
    server_files.key.unlink()
    assert tls.changed_configuration() is None
    assert "No such file or directory" in caplog.messages[-1]


async def status_of(port: int, authority: trustme.CA, caller: trustme.LeafCert | None) -> grpc.StatusCode:
    """How a call over a new connection ends."""
    pair = (caller.private_key_pem.bytes(), caller.cert_chain_pems[0].bytes()) if caller else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), *pair)
    own_connection = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials, own_connection) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_new_connections_are_held_to_the_files_as_they_are_now(
    server_files: CertificateFiles, tmp_path: Path
) -> None:
    client_ca = authority_file(tmp_path, AUTHORITY)
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    _, plain_tls_port = bind(server, "127.0.0.1:0", ServerTls(files_of(server_files)))
    _, port = bind(server, "127.0.0.1:0", ServerTls(files_of(server_files, client_ca)))
    await server.start()
    try:
        ours, others = AUTHORITY.issue_cert("a.test"), OTHER_AUTHORITY.issue_cert("a.test")
        ok, unavailable = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
        assert await status_of(plain_tls_port, AUTHORITY, None) is ok
        assert await status_of(plain_tls_port, OTHER_AUTHORITY, None) is unavailable
        for caller, code in ((ours, ok), (others, unavailable), (None, unavailable)):
            assert await status_of(port, AUTHORITY, caller) is code
        authority_file(tmp_path, OTHER_AUTHORITY)
        server_files.write(OTHER_AUTHORITY.issue_cert("localhost"))
        for caller, code in ((ours, unavailable), (others, ok), (None, unavailable)):
            assert await status_of(port, OTHER_AUTHORITY, caller) is code
        assert await status_of(plain_tls_port, OTHER_AUTHORITY, None) is ok
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        pytest.param(
            {
                "x509_common_name": [b"alice"],
                "peer_dns": [b"a.test", b"b.test"],
                "peer_email": [b"alice@example.org"],
                "peer_uri": [b"spiffe://example.org/alice"],
            },
            "spiffe://example.org/alice",
            id="URI",
        ),
        pytest.param(
            {"peer_dns": [b"a.test"], "peer_email": [b"alice@example.org"]}, "alice@example.org", id="email"
        ),
        pytest.param({"x509_common_name": [b""], "peer_dns": [b"a.test", b"b.test"]}, "a.test", id="DNS"),
        pytest.param({"x509_common_name": ["Jürgen".encode()], "peer_ip": [b"10.0.0.1"]}, "Jürgen", id="CN"),
    ],
)
def test_the_first_name_of_the_first_kind_names_a_caller(facts: dict[str, list[bytes]], name: str) -> None:
    assert name_in_certificate(facts) == name


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "CERTIFICATE_WITHOUT_NAME"),
        ({"x509_common_name": [b""], "peer_ip": [b"10.0.0.1"]}, "CERTIFICATE_WITHOUT_NAME"),
        ({"x509_common_name": [b"a\nb"]}, "CERTIFICATE_NAME_UNUSABLE"),
        ({"x509_common_name": [b"\xff"]}, "CERTIFICATE_NAME_UNUSABLE"),
        ({"peer_uri": [b"x" * 257], "peer_dns": [b"a.test"]}, "CERTIFICATE_NAME_UNUSABLE"),
    ],
)
def test_a_certificate_that_names_nobody_is_refused(facts: dict[str, list[bytes]], reason: str) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        name_in_certificate(facts)
    assert refused.value.reason == reason


def test_with_a_certificate_its_name_owns_the_jobs_whatever_a_proxy_says() -> None:
    call = Call(method="/hidream.v1.ImageGen/Generate", peer="ipv4:10.0.0.7:5", deadline=None)
    callers = CallerIdentification(have_certificates=True)
    callers.identify(call, [("x-forwarded-for", "1.2.3.4")], lambda: {"peer_dns": [b"a.test"]})
    assert (call.caller, call.owner) == ("a.test", "a.test")
