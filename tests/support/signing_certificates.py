"""Certificates that sign manifests, of an authority of the test's own."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.support.certificates import CertificateFiles

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class SigningAuthority:
    """An authority, and the key with which it issues certificates."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls) -> SigningAuthority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Authority of a test")
        is_authority = x509.BasicConstraints(ca=True, path_length=None)
        builder = _builder(name, name, key.public_key(), last_day=60).add_extension(is_authority, True)
        usage = _usage(key_cert_sign=True, crl_sign=True)
        return cls(builder.add_extension(usage, True).sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        folder: Path,
        key: Any = None,
        *,
        last_day: int = 50,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    ) -> CertificateFiles:
        """The files of a certificate that is valid from 40 days ago to `last_day` days from now."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name("Studio"), self.certificate.subject, key.public_key(), last_day=last_day)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        for extension, is_critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(digital_signature=True), True),
            (identifier, False),
            (x509.ExtendedKeyUsage([usage]), False),
        ):
            builder = builder.add_extension(extension, is_critical)
        certificate = builder.sign(self.key, hashes.SHA256())
        files = CertificateFiles(folder / "signing.pem", folder / "signing-key.pem")
        files.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + self.pem)
        files.key.write_bytes(pem_of(key))
        return files

    def verify(self, file: bytes, mime_type: str) -> dict[str, Any]:
        """What the library reads in a file, where this is the one authority that it trusts."""
        settings = {"trust": {"trust_anchors": self.pem.decode()}, "verify": {"verify_trust": True}}
        with (
            c2pa.Context(c2pa.Settings.from_dict(settings)) as context,
            c2pa.Reader(mime_type, BytesIO(file), context=context) as reader,
        ):
            found: dict[str, Any] = json.loads(reader.json())
            return found


def pem_of(key: Any, encryption: serialization.KeySerializationEncryption | None = None) -> bytes:
    """A private key as most tools write it."""
    return key.private_bytes(  # type: ignore[no-any-return]
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, *, last_day: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 40 * DAY)
        .not_valid_after(now + last_day * DAY)
    )


def _name(common_name: str) -> x509.Name:
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Studio")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name), organization])


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
