"""The certificate with which images are signed, checked before a model is loaded."""

from __future__ import annotations

import datetime
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.decoding.images import encode_image
from hidream_grpc.model.manifest_signing import ManifestSigner
from hidream_grpc.model.parameters import OutputFormat
from hidream_grpc.server.operator_files import read_operator_file

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

logger = logging.getLogger(__name__)

CERTIFICATE_FLAG = "--c2pa-certificate"
KEY_FLAG = "--c2pa-key"
SOON = datetime.timedelta(days=30)


def manifest_signer(certificate: Path | None, key: Path | None) -> ManifestSigner | None:
    """What signs the images of this server; None where they are not signed.

    Raises:
        ConfigurationError: in one line, which flag or file is wrong, and how.
    """
    if certificate is None and key is None:
        return None
    if certificate is None:
        raise ConfigurationError(KEY_FLAG, f"needs {CERTIFICATE_FLAG}")
    if key is None:
        raise ConfigurationError(CERTIFICATE_FLAG, f"needs {KEY_FLAG}")
    if importlib.util.find_spec("c2pa") is None:
        raise ConfigurationError(CERTIFICATE_FLAG, "needs c2pa-python: pip install 'hidream-grpc[c2pa]'")
    chain = read_operator_file(CERTIFICATE_FLAG, certificate)
    first = _first_certificate(certificate, chain)
    private_key = _private_key(key, read_operator_file(KEY_FLAG, key))
    if private_key.public_key() != first.public_key():
        reason = f"{key}: is not the key of the first certificate of {CERTIFICATE_FLAG}"
        raise ConfigurationError(KEY_FLAG, reason)
    signer = ManifestSigner(
        certificates=chain, key=_pkcs8(private_key), algorithm=_algorithm(key, private_key)
    )
    _check_dates(certificate, first)
    _check_by_signing(certificate, signer)
    return signer


def _first_certificate(path: Path, chain: bytes) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        reason = f"{path}: holds no certificate in PEM, or a broken one"
        raise ConfigurationError(CERTIFICATE_FLAG, reason) from None


def _private_key(path: Path, content: bytes) -> PrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        return serialization.load_pem_private_key(content, None)
    except TypeError:
        reason = "has a passphrase; the server needs a key without one"
    except (ValueError, UnsupportedAlgorithm):
        reason = "holds no private key in PEM, or a broken one"
    raise ConfigurationError(KEY_FLAG, f"{path}: {reason}")


def _pkcs8(key: PrivateKeyTypes) -> bytes:
    """The key in the one form that the library takes."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _algorithm(path: Path, key: PrivateKeyTypes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    algorithms_of_curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in algorithms_of_curves:
        return algorithms_of_curves[key.curve.name]
    reason = "is neither Ed25519, nor RSA of 2048 bits or more, nor on the curves P-256, P-384 or P-521"
    raise ConfigurationError(KEY_FLAG, f"{path}: {reason}")


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        reason = f"{path}: is valid from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, not now"
        raise ConfigurationError(CERTIFICATE_FLAG, reason)
    if last - now < SOON:
        # It is read at the start alone, and images that cannot be signed fail.
        logger.warning("%s: %s: ends on %s UTC", CERTIFICATE_FLAG, path, f"{last:%Y-%m-%d %H:%M}")


def _check_by_signing(path: Path, signer: ManifestSigner) -> None:
    """Sign an image: the library knows what a certificate must allow, and checks what it has signed."""
    import c2pa

    image = encode_image(np.zeros((8, 8, 3), np.uint8), OutputFormat.PNG, 90)
    try:
        signer.sign(image, OutputFormat.PNG.mime_type)
    except c2pa.C2paError as error:
        said = str(error).removeprefix("Signature: ")
        reason = (
            f"{path}: is not fit for signing manifests ({said}); it needs an authority above it, the "
            "key usage digitalSignature and an extended key usage such as emailProtection"
        )
        raise ConfigurationError(CERTIFICATE_FLAG, reason) from None
