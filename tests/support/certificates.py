"""Certificates of an authority of the test's own, as the PEM files that settings and flags name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class CertificateFiles:
    """A certificate and its private key."""

    certificate: Path
    key: Path

    def write(self, issued: trustme.LeafCert) -> None:
        """Replace both files whole, the key first."""
        for path, content in (
            (self.key, issued.private_key_pem.bytes()),
            (self.certificate, b"".join(blob.bytes() for blob in issued.cert_chain_pems)),
        ):
            fresh = path.with_name("fresh")
            fresh.write_bytes(content)
            fresh.replace(path)


def certificate_files(folder: Path, name: str, issued: trustme.LeafCert) -> CertificateFiles:
    """Write a certificate and its key into a folder."""
    files = CertificateFiles(folder / f"{name}.pem", folder / f"{name}-key.pem")
    files.write(issued)
    return files


def authority_file(folder: Path, authority: trustme.CA, name: str = "ca") -> Path:
    """Write the certificate of an authority into a folder."""
    path = folder / f"{name}.pem"
    path.write_bytes(authority.cert_pem.bytes())
    return path
