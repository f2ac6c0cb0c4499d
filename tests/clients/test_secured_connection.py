from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner, Result

from hidream.aio import AsyncClient
from hidream.client import Client
from hidream.commands import app
from hidream.connection import Tls
from hidream.errors import UnauthenticatedError, UnavailableError
from hidream.health import HealthStatus

TOKEN = "a-token"


class TokenCheckingHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serves those who bring the token."""

    def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        if ("authorization", f"Bearer {TOKEN}") not in [
            tuple(pair) for pair in context.invocation_metadata()
        ]:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "a token is needed")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@dataclass(frozen=True)
class SecuredServer:
    """A server that wants TLS on both sides and a token, and what its callers need."""

    address: str
    tls: Tls


@contextmanager
def serving(credentials: grpc.ServerCredentials) -> Iterator[int]:
    """The port of a server with these credentials."""
    with ThreadPoolExecutor(max_workers=2) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(TokenCheckingHealth(), server)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield port
        server.stop(None).wait()


@pytest.fixture
def secured_server() -> Iterator[SecuredServer]:
    authority = trustme.CA()
    root_certificates = authority.cert_pem.bytes()
    server_certificate = authority.issue_cert("hidream.test")
    client_certificate = authority.issue_cert("caller@hidream.test")
    credentials = grpc.ssl_server_credentials(
        [(server_certificate.private_key_pem.bytes(), server_certificate.cert_chain_pems[0].bytes())],
        root_certificates,
        require_client_auth=True,
    )
    with serving(credentials) as port:
        yield SecuredServer(
            f"127.0.0.1:{port}",
            Tls(
                root_certificates=root_certificates,
                private_key=client_certificate.private_key_pem.bytes(),
                certificate_chain=client_certificate.cert_chain_pems[0].bytes(),
                server_name="hidream.test",
            ),
        )


async def test_both_clients_speak_mutual_tls_and_bring_their_token(secured_server: SecuredServer) -> None:
    with Client(secured_server.address, token=TOKEN, tls=secured_server.tls) as client:
        assert client.health() is HealthStatus.SERVING
    async with AsyncClient(secured_server.address, token=TOKEN, tls=secured_server.tls) as async_client:
        assert await async_client.health() is HealthStatus.SERVING


def test_a_caller_without_the_token_is_told_so(secured_server: SecuredServer) -> None:
    with (
        Client(secured_server.address, tls=secured_server.tls) as client,
        pytest.raises(UnauthenticatedError, match="a token is needed"),
    ):
        client.health()


def test_a_server_that_nobody_vouches_for_is_not_spoken_to(secured_server: SecuredServer) -> None:
    with (
        Client(secured_server.address, token=TOKEN, tls=Tls(server_name="hidream.test")) as client,
        pytest.raises(UnavailableError),
    ):
        client.health()


def test_the_command_speaks_mutual_tls_and_brings_its_token_where_the_servers_authority_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    ours, theirs = authority.issue_cert("caller@hidream.test"), authority.issue_cert("localhost")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    ours.cert_chain_pems[0].write_to_path(str(files["cert"]))
    ours.private_key_pem.write_to_path(str(files["key"]))
    credentials = grpc.ssl_server_credentials(
        [(theirs.private_key_pem.bytes(), theirs.cert_chain_pems[0].bytes())],
        authority.cert_pem.bytes(),
        require_client_auth=True,
    )
    options = {name: (f"--{name}-file", str(file)) for name, file in files.items()}
    monkeypatch.setenv("HIDREAM_TOKEN", TOKEN)
    with serving(credentials) as port:

        def health(*arguments: str, scheme: str = "") -> Result:
            address = f"{scheme}localhost:{port}"
            return CliRunner().invoke(app, ["health", "--address", address, "--timeout", "5", *arguments])

        known = health(*options["ca"], *options["cert"], *options["key"], scheme="https://")
        assert (known.exit_code, known.stdout) == (0, "SERVING\n")
        assert health(*options["ca"]).exit_code == 3  # the server does not know who calls
        assert health("--tls", *options["cert"], *options["key"]).exit_code == 3
        plain = health(*options["ca"], scheme="http://")
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert "http:// is not encrypted, and TLS is asked for" in plain.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        pytest.param(["--ca-file", "absent.pem"], "absent.pem: No such file", id="no such file"),
        pytest.param(["--ca-file", "prose.pem"], "prose.pem holds no certificate in PEM", id="prose"),
        pytest.param(["--cert-file", "a.pem"], "a certificate and its key are given together", id="no key"),
        pytest.param(["--key-file", "a.pem"], "a certificate and its key are given together", id="a key"),
    ],
)
def test_files_that_cannot_secure_a_connection_are_one_line_and_exit_code_2(
    options: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prose.pem").write_text("once upon a time")
    result = CliRunner().invoke(app, ["health", *options])
    assert (result.exit_code, result.stdout) == (2, "")
    [told] = result.stderr.splitlines()
    assert line in told
