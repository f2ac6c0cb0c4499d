"""What signs images, what is wrong with its files, and what a signed file then says."""

from __future__ import annotations

import logging
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from hidream.commands import app
from hidream.generated_image import GeneratedImage
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.decoding.images import encode_image
from hidream_grpc.model.manifest_signing import ManifestSigner
from hidream_grpc.model.parameters import OutputFormat
from hidream_grpc.server.manifest_certificate import manifest_signer
from hidream_grpc.version import SERVER_VERSION
from tests.support.certificates import CertificateFiles
from tests.support.refused_starts import refused_line_here
from tests.support.signing_certificates import SigningAuthority, pem_of

AUTHORITY = SigningAuthority.new()
CERTIFICATE, KEY = "--c2pa-certificate", "--c2pa-key"


def signer_of(files: CertificateFiles) -> ManifestSigner:
    signer = manifest_signer(files.certificate, files.key)
    assert signer is not None
    return signer


def image(output_format: OutputFormat) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return encode_image(pixels, output_format, 90, has_mark=True, text='{"spec": {}, "execution": {}}')


@pytest.mark.parametrize("output_format", OutputFormat)
def test_a_signed_image_says_what_made_it_and_one_changed_byte_is_found(
    output_format: OutputFormat, tmp_path: Path
) -> None:
    signer = signer_of(AUTHORITY.issue(tmp_path))
    plain, mime_type = image(output_format), output_format.mime_type
    signed = signer.sign(plain, mime_type)
    found = AUTHORITY.verify(signed, mime_type)
    assert found["validation_state"] == "Trusted"
    manifest = found["manifests"][found["active_manifest"]]
    generator = manifest["claim_generator_info"][0]
    assert (generator["name"], generator["version"]) == ("hidream-grpc", SERVER_VERSION)
    (assertion,) = manifest["assertions"]
    (action,) = assertion["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    stranger = SigningAuthority.new().verify(signed, mime_type)
    assert [status["code"] for status in stranger["validation_status"]] == ["signingCredential.untrusted"]
    altered = bytearray(signed)
    middle = len(plain) // 2
    altered[signed.index(plain[middle : middle + 16])] ^= 1
    found = AUTHORITY.verify(bytes(altered), mime_type)
    assert found["validation_state"] == "Invalid"
    assert "assertion.dataHash.mismatch" in [status["code"] for status in found["validation_status"]]


@pytest.mark.parametrize("output_format", OutputFormat)
def test_show_says_that_there_is_a_manifest_beside_all_that_the_file_says_without_one(
    output_format: OutputFormat, tmp_path: Path
) -> None:
    signer = signer_of(AUTHORITY.issue(tmp_path))
    path = tmp_path / "image"
    plain = image(output_format)
    path.write_bytes(plain)
    without = GeneratedImage.read(str(path))
    path.write_bytes(signer.sign(plain, output_format.mime_type))
    signed = GeneratedImage.read(str(path))
    assert (without.has_manifest, signed.has_manifest) == (False, True)
    assert (signed.is_marked, signed.spec) == (without.is_marked, without.spec) == (True, without.spec)
    assert signed.compared_with(plain).endswith("the pixels are the same")
    assert "has a manifest, not verified here" in CliRunner().invoke(app, ["show", str(path)]).stdout


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP384R1()), "es384"),
        (ec.generate_private_key(ec.SECP521R1()), "es512"),
        (rsa.generate_private_key(65537, 2048), "ps256"),
        (ed25519.Ed25519PrivateKey.generate(), "ed25519"),
    ],
    ids=["P-384", "P-521", "RSA", "Ed25519"],
)
def test_every_kind_of_key_that_c2pa_knows_signs(key: object, algorithm: str, tmp_path: Path) -> None:
    assert signer_of(AUTHORITY.issue(tmp_path, key)).algorithm == algorithm


def test_a_key_as_openssl_ecparam_writes_it_signs_and_never_stands_in_a_log(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    files = AUTHORITY.issue(tmp_path, key)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    signer = signer_of(files)
    assert repr(signer) == "ManifestSigner(es256)"


@pytest.mark.parametrize(
    ("flag", "content", "reason"),
    [
        (CERTIFICATE, None, "No such file or directory"),
        (CERTIFICATE, b"prose", "holds no certificate in PEM, or a broken one"),
        (KEY, b"prose", "holds no private key in PEM, or a broken one"),
        (
            KEY,
            pem_of(ec.generate_private_key(ec.SECP256R1()), serialization.BestAvailableEncryption(b"secret")),
            "has a passphrase; the server needs a key without one",
        ),
        (
            KEY,
            pem_of(ec.generate_private_key(ec.SECP256R1())),
            "is not the key of the first certificate of --c2pa-certificate",
        ),
    ],
    ids=["absent", "no certificate", "no key", "passphrase", "another key"],
)
def test_a_wrong_file_is_one_line_that_names_it(
    flag: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    files = AUTHORITY.issue(tmp_path)
    wrong = tmp_path / "wrong"
    if content is not None:
        wrong.write_bytes(content)
    paths = {CERTIFICATE: files.certificate, KEY: files.key, flag: wrong}
    with pytest.raises(ConfigurationError) as refused:
        manifest_signer(paths[CERTIFICATE], paths[KEY])
    assert str(refused.value) == f"{flag}: {wrong}: {reason}"


def test_a_certificate_that_may_not_sign_manifests_is_refused_with_the_reason(tmp_path: Path) -> None:
    files = AUTHORITY.issue(tmp_path, usage=ExtendedKeyUsageOID.SERVER_AUTH)
    with pytest.raises(ConfigurationError, match=r"is not fit for signing manifests .*emailProtection"):
        signer_of(files)
    files = AUTHORITY.issue(tmp_path, last_day=-1)
    with pytest.raises(ConfigurationError, match=r"is valid from .* UTC, not now"):
        signer_of(files)
    files = AUTHORITY.issue(tmp_path, rsa.generate_private_key(65537, 1024))
    with pytest.raises(ConfigurationError, match="is neither Ed25519, nor RSA of 2048 bits or more"):
        signer_of(files)


def test_no_image_is_signed_with_a_certificate_that_has_ended_meanwhile(tmp_path: Path) -> None:
    files = AUTHORITY.issue(tmp_path, last_day=-1)
    signer = ManifestSigner(
        certificates=files.certificate.read_bytes(), key=files.key.read_bytes(), algorithm="es256"
    )
    with pytest.raises(c2pa.C2paError, match="was not valid at time of signing"):
        signer.sign(image(OutputFormat.PNG), OutputFormat.PNG.mime_type)


def test_a_certificate_that_ends_soon_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    signer_of(AUTHORITY.issue(tmp_path, last_day=45))
    assert not caplog.records
    signer_of(AUTHORITY.issue(tmp_path, last_day=20))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "ends on" in warning.message


def test_a_server_without_the_other_flag_the_extra_or_a_fit_certificate_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = AUTHORITY.issue(tmp_path, usage=ExtendedKeyUsageOID.SERVER_AUTH)
    needs = "hidream-grpc: --c2pa-{}: needs --c2pa-{}"
    assert refused_line_here([CERTIFICATE, files.certificate]) == needs.format("certificate", "key")
    assert refused_line_here([KEY, files.key]) == needs.format("key", "certificate")
    both: list[str | Path] = [CERTIFICATE, files.certificate, KEY, files.key]
    assert "is not fit for signing manifests" in refused_line_here(both)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    extra = "needs c2pa-python: pip install 'hidream-grpc[c2pa]'"
    assert refused_line_here(both) == f"hidream-grpc: {CERTIFICATE}: {extra}"
