"""The certificate of the bridge and the authority of its callers, read again when the files change.

The files are looked at whenever somebody connects. Connections that are open go on as they are.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hidream.certificate_names import name_in_certificate
from hidream_http.settings import SettingError, TlsFiles

logger = logging.getLogger(__name__)

CERTIFICATE_FLAG = "--tls-certificate"
KEY_FLAG = "--tls-key"
CLIENT_CA_FLAG = "--tls-client-ca"

_ALTERNATIVE_NAMES = {"URI": "peer_uri", "email": "peer_email", "DNS": "peer_dns"}

Version = tuple[int, int, int]


def tls_files(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """The files of a bridge that encrypts; None for one that does not.

    Raises:
        SettingError: a flag is missing that another one needs.
    """
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_ca)
    if certificate is not None:
        raise SettingError(CERTIFICATE_FLAG, f"needs {KEY_FLAG}")
    if key is not None:
        raise SettingError(KEY_FLAG, f"needs {CERTIFICATE_FLAG}")
    if client_ca is not None:
        raise SettingError(CLIENT_CA_FLAG, f"needs {CERTIFICATE_FLAG} and {KEY_FLAG}")
    return None


class ListenerTls:
    """What the listener shows and asks at the beginning of each connection.

    A version of the files that is wrong or cannot be read changes nothing: the log says so once, and new
    connections are served with the version before it.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        Raises:
            SettingError: in one line, which file is wrong, and how.
        """
        self._files = files
        self._versions = self._versions_now()
        self._reported_reason: str | None = None
        self._current = self._read()

    def context(self) -> ssl.SSLContext:
        """What a socket listens with; each connection takes the files as they are then."""
        context = self._read()
        # Called in each handshake, before any certificate is chosen; also where no name is asked for.
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLObject, _name: str, _listener: ssl.SSLContext) -> None:
        self._read_if_changed()
        connection.context = self._current

    def _read_if_changed(self) -> None:
        versions = self._versions_now()
        if versions == self._versions:
            return
        try:
            self._current = self._read()
        except SettingError as error:
            # Tried again at every connection: certificate and key may be replaced one after the other.
            if str(error) != self._reported_reason:
                logger.error("%s; the certificates stay as they were", error)
            self._reported_reason = str(error)
            return
        # Taken before the files are read: a change meanwhile is seen at the next connection.
        self._versions = versions
        self._reported_reason = None
        logger.info("%s: new connections have it as it is now", self._files.certificate)

    def _versions_now(self) -> tuple[Version | None, ...]:
        files = self._files
        return tuple(_version_of(path) for path in (files.certificate, files.key, files.client_ca) if path)

    def _read(self) -> ssl.SSLContext:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        certificate = _existing(CERTIFICATE_FLAG, files.certificate)
        _authorities(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), CERTIFICATE_FLAG, certificate)
        _load_key(context, certificate, _existing(KEY_FLAG, files.key))
        if files.client_ca is not None:
            _authorities(context, CLIENT_CA_FLAG, _existing(CLIENT_CA_FLAG, files.client_ca))
            context.verify_mode = ssl.CERT_REQUIRED
            # A session that goes on would not be asked for its certificate again.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context


def name_of_caller(certificate: Mapping[str, Any]) -> bytes:
    """The name in a certificate that `getpeercert` has read, in UTF-8; empty where it has none."""
    alternatives, subject = certificate.get("subjectAltName", ()), certificate.get("subject", ())
    facts = {
        fact: [name.encode() for kind, name in alternatives if kind == wanted]
        for wanted, fact in _ALTERNATIVE_NAMES.items()
    }
    common_names = [value.encode() for part in subject for key, value in part if key == "commonName"]
    return name_in_certificate({**facts, "x509_common_name": common_names})


def _version_of(path: Path) -> Version | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _existing(flag: str, path: Path) -> Path:
    try:
        if not path.is_file():
            reason = "is no regular file" if path.exists() else "No such file or directory"
            raise SettingError(flag, f"{path}: {reason}")
        path.read_bytes()
    except OSError as error:
        raise SettingError(flag, f"{path}: {error.strerror}") from None
    return path


def _authorities(context: ssl.SSLContext, flag: str, path: Path) -> None:
    try:
        context.load_verify_locations(path)
    except (ssl.SSLError, ValueError):
        raise SettingError(flag, f"{path}: holds no certificate in PEM, or a broken one") from None


def _load_key(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    def refuse_passphrase() -> bytes:
        raise SettingError(KEY_FLAG, f"{key}: has a passphrase; the bridge needs a key without one")

    try:
        context.load_cert_chain(certificate, key, refuse_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            reason = f"is not the key of the first certificate of {CERTIFICATE_FLAG}"
        else:
            reason = "holds no private key in PEM, or a broken one"
        raise SettingError(KEY_FLAG, f"{key}: {reason}") from None
