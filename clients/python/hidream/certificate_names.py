"""The name by which a certificate calls its holder: one rule for the server and for the HTTP bridge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FORWARDED_NAME = "x-forwarded-client-name-bin"
"""The metadata in which a bridge names its caller, in UTF-8; empty where the certificate has no name."""

_NAMES_IN_CERTIFICATE = ("peer_uri", "peer_email", "peer_dns", "x509_common_name")
"""Where grpc says what a certificate names: the kinds of subject alternative names, then the common name."""


def name_in_certificate(facts: Mapping[str, Iterable[bytes]]) -> bytes:
    """The first name of the first kind that a certificate has: URI, email, DNS name, common name; or empty.

    Args:
        facts: of a certificate, under the names that grpc gives them.
    """
    return next((value for kind in _NAMES_IN_CERTIFICATE for value in facts.get(kind, ()) if value), b"")
