"""The server's certificate and the authority of its callers, read again when the files change.

The files are looked at whenever somebody connects. Connections that are open go on as they are.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.server.operator_files import read_operator_file, version_of

logger = logging.getLogger(__name__)

CERTIFICATE_FLAG = "--tls-certificate"
KEY_FLAG = "--tls-key"
CLIENT_CA_FLAG = "--tls-client-ca"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files that an operator names, all in PEM.

    Attributes:
        certificate: the certificate of the server, then those between it and its authority.
        key: the private key of the certificate, without a passphrase.
        client_ca: authorities, one of which vouches for each caller; None where callers need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None


def tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """The files of a server that encrypts; None for one that does not.

    Raises:
        ConfigurationError: a flag is missing that another one needs.
    """
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_ca)
    if certificate is not None:
        raise ConfigurationError(CERTIFICATE_FLAG, f"needs {KEY_FLAG}")
    if key is not None:
        raise ConfigurationError(KEY_FLAG, f"needs {CERTIFICATE_FLAG}")
    if client_ca is not None:
        raise ConfigurationError(CLIENT_CA_FLAG, f"needs {CERTIFICATE_FLAG} and {KEY_FLAG}")
    return None


class ServerTls:
    """What grpc shows and asks at the beginning of each connection.

    A version of the files that is wrong or cannot be read changes nothing: the log says so once, and new
    connections are served with the version before it.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            ConfigurationError: in one line, which file is wrong, and how.
        """
        self._files = files
        self._lock = threading.Lock()
        self._versions = self._versions_now()
        self._reported_reason: str | None = None
        self._configuration = self._read()

    def __str__(self) -> str:
        """What a connection has, for the log."""
        return "TLS" if self._files.client_ca is None else "mutual TLS"

    def credentials(self) -> grpc.ServerCredentials:
        """What a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            # The stubs do not know that None stands for no change.
            self.changed_configuration,  # type: ignore[arg-type]
            self._files.client_ca is not None,
        )

    def changed_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """The content of the files where it has changed since the last time, else None.

        Called by a thread of grpc for every new connection.
        """
        with self._lock:
            versions = self._versions_now()
            if versions == self._versions:
                self._reported_reason = None
                return None
            try:
                configuration = self._read()
            except ConfigurationError as error:
                # Tried again at every connection: certificate and key may be replaced one after the other.
                if str(error) != self._reported_reason:
                    logger.error("%s; the certificates stay as they were", error)
                self._reported_reason = str(error)
                return None
            # Taken before the files are read: a change meanwhile is seen at the next connection.
            self._versions = versions
            self._reported_reason = None
        logger.info("%s: new connections have it as it is now", self._files.certificate)
        return configuration

    def _versions_now(self) -> tuple[object, ...]:
        paths = (self._files.certificate, self._files.key, self._files.client_ca)
        return tuple(None if path is None else version_of(path) for path in paths)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        chain = _certificates(CERTIFICATE_FLAG, files.certificate)
        key = read_operator_file(KEY_FLAG, files.key)
        _check_key(files.key, key, chain)
        authorities = None if files.client_ca is None else _certificates(CLIENT_CA_FLAG, files.client_ca)
        return grpc.ssl_server_certificate_configuration([(key, chain)], authorities)


def _certificates(flag: str, path: Path) -> bytes:
    """The content of a file of certificates, each of which can be read."""
    content = read_operator_file(flag, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(
            cadata=content.decode("ascii", "backslashreplace")
        )
    except (ssl.SSLError, ValueError):
        raise ConfigurationError(flag, f"{path}: holds no certificate in PEM, or a broken one") from None
    return content


def _check_key(path: Path, key: bytes, chain: bytes) -> None:
    def refuse_passphrase() -> bytes:
        raise ConfigurationError(KEY_FLAG, f"{path}: has a passphrase; the server needs a key without one")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with _in_memory(chain) as chain_file, _in_memory(key) as key_file:
        try:
            context.load_cert_chain(chain_file, key_file, refuse_passphrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                reason = f"is not the key of the first certificate of {CERTIFICATE_FLAG}"
            else:
                reason = "holds no private key in PEM, or a broken one"
            raise ConfigurationError(KEY_FLAG, f"{path}: {reason}") from None


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file that is on no disk: ssl reads keys from paths, and the file may change meanwhile."""
    descriptor = os.memfd_create("tls")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
